"""One of several processes that use `jvgen.parallel.processes`: `worker.py SCENARIO PORT PROCESSES PROCESS FOLDER`."""

import json
import sys
import time
from pathlib import Path

from jvgen.config import ConfigError
from jvgen.parallel import failing, processes
from jvgen.training.checkpoint.save_barrier import SaveBarrier

scenario, port, number_of, number, folder = sys.argv[1], *map(int, sys.argv[2:5]), Path(sys.argv[5])
told = {}


def failure(function, *arguments) -> str:
    try:
        function(*arguments)
    except (processes.LostProcess, ConfigError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def agreements() -> None:
    told["count"], told["index"] = processes.count(), processes.index()
    processes.barrier("start")
    told["broadcast"] = [processes.broadcast({"from": number, "turn": turn}, "value") for turn in range(2)]
    told["combined"] = processes.combine(number + 1, sum, "sum")
    told["same"] = failure(processes.agree, {"seed": 3, "config": "abc"})
    told["differ"] = failure(
        processes.agree, {"seed": 3, "config": "abc" if number != 1 else "xyz", "step": number if number == 2 else 0}
    )
    if number == 1:
        time.sleep(2.5)
    told["late"] = failure(processes.barrier, "save", 1.0)
    processes.barrier("save again")


def saves() -> None:
    """The barriers of three saves as Orbax passes them; in the second, process 1 cannot write its part."""

    def at(key: str) -> None:
        barrier(key=key, timeout_ms=60_000)

    processes.barrier("start")
    for save in range(3):
        # As runs one after the other in the same processes make them.
        barrier = SaveBarrier()
        at("set_value_start")
        began, problem = time.monotonic(), "none"
        try:
            time.sleep(0.2 * number)
            if save == 1 and number == 1:
                raise OSError("no space left on device")
            at("async_write_complete")
            at("async_commit_complete")
        except (OSError, RuntimeError) as error:
            problem = f"{type(error).__name__}: {error}"
        at("set_value_start")
        told[f"save {save}"] = [problem, time.monotonic() - began]
    told["kept"] = len(processes.notes("saves/set_value_start/1"))


def fails() -> None:
    processes.barrier("start")
    told["start"] = time.time()
    (folder / f"{number}.json").write_text(json.dumps(told))
    if number == int(scenario[-1]):
        if scenario.startswith("mistake"):
            raise ConfigError("data.path = 3: a path.")
        raise RuntimeError("a bug\nin two lines")
    time.sleep(60)


try:
    with failing.fail_fast(folder):
        processes.initialize(f"127.0.0.1:{port}", number_of, number, timeout=4 if scenario == "alone" else 60)
        {"agreements": agreements, "saves": saves}.get(scenario, fails)()
except processes.LostProcess as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
(folder / f"{number}.json").write_text(json.dumps(told))
