"""XLA's optimized program of a step for a TPU pod, without machine code: another process compiles and is stopped.

libtpu optimizes a step in seconds to minutes. For convolutions it then searches the tiles of each, which takes it half
an hour for a large autoencoder. What is known before that: memory, collectives, bytes and FLOPs of every operation.
"""

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from jvgen import saved_config
from jvgen.config import ConfigError
from jvgen.preflight.report import Memory
from jvgen.training.experiment import Experiment

_RUN, _LOG = "run.json", "log.txt"
# libtpu writes the second file after the first, and after that of the memory.
_PROGRAM, _LAST = "*.after_optimizations.txt", "*.after_optimizations_after_buffer_assignment.txt"
_BUFFERS = "*.after_optimizations-buffer-assignment.txt"
_ALLOCATION = re.compile(r"^allocation \d+: size (\d+)(.*):$")


class DoesNotFitError(Exception):
    """A step needs more memory than a device has; the message is XLA's."""


@dataclasses.dataclass(frozen=True)
class OptimizedProgram:
    """A program before machine code is generated.

    Attributes:
      text: HLO, scheduled, without XLA's estimates of cycles.
      memory: as XLA has assigned it, without the program's own and without a peak.
    """

    text: str
    memory: Memory


def optimize(experiment: Experiment, topology: str, slices: int, folder: Path, poll: float = 0.5) -> OptimizedProgram:
    """Let another process compile the step of the only batch shape of a run until XLA has optimized it.

    Args:
      experiment: the run, with one batch shape.
      topology, slices: see `jvgen.preflight.ahead_of_time.compile_ahead`.
      folder: an empty folder for the other process's files.
      poll: seconds between looks at it.

    Raises:
      DoesNotFitError: XLA says that the program does not fit.
      ConfigError: a class of the run is defined in its config file, which another process cannot import; or that
        process ended otherwise before the program was there.
    """
    own = [module for module in _modules(saved_config.to_json(experiment)) if module not in sys.modules]
    if own:
        raise ConfigError(
            f"--without-code: {own[0].removeprefix('jvgen_config_')}.py defines config classes of its own, which "
            "another process cannot import; move them into a module, or leave out --without-code."
        )
    run = {"experiment": saved_config.to_json(experiment), "topology": topology, "slices": slices}
    (folder / _RUN).write_text(json.dumps(run))
    # Described devices need no other backend, and cannot read a cache.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "0"}
    command = [sys.executable, "-m", __spec__.name, str(folder)]
    with (folder / _LOG).open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        while not list(folder.glob(_LAST)):
            if process.poll() is not None and not list(folder.glob(_LAST)):
                raise _failure((folder / _LOG).read_text(errors="replace"), process.returncode)
            time.sleep(poll)
    finally:
        process.kill()
        process.wait()
    return OptimizedProgram(_largest(folder, _PROGRAM), _memory(_largest(folder, _BUFFERS)))


def _modules(experiment: str) -> set[str]:
    """Modules of a user's own classes in a run as JSON, where they are named with them."""
    return set(re.findall(r'"class": "([\w.]+):', experiment))


def _failure(log: str, status: int) -> Exception:
    _, full, rest = log.partition("RESOURCE_EXHAUSTED")
    if full:
        return DoesNotFitError(full + rest)
    last = (log.strip().splitlines() or ["it printed nothing"])[-1]
    return ConfigError(f"the process that compiles the step ended early with status {status}: {last}")


def _largest(folder: Path, pattern: str) -> str:
    """Of a program with small ones beside it, that of the step."""
    return max(folder.glob(pattern), key=lambda path: path.stat().st_size).read_text(errors="replace")


def _memory(assignment: str) -> Memory:
    """Bytes of XLA's buffers in main memory: those of arguments, of results, in both, and all others."""
    sizes = {"argument": 0.0, "both": 0.0, "result": 0.0, "temporary": 0.0}
    for size, about in _allocations(assignment):
        if "thread-local" in about or ", constant" in about or re.search(r"color [1-9]", about):
            continue
        is_result = "maybe-live-out" in about
        if ", parameter " in about:
            sizes["both" if is_result else "argument"] += size
        else:
            sizes["result" if is_result else "temporary"] += size
    arguments, outputs = sizes["argument"] + sizes["both"], sizes["result"] + sizes["both"]
    return Memory(
        arguments=arguments, outputs=outputs, aliased=sizes["both"], temporaries=sizes["temporary"], code=0.0, peak=0.0
    )  # fmt: skip


def _allocations(assignment: str) -> Iterator[tuple[int, str]]:
    for line in assignment.splitlines():
        if found := _ALLOCATION.match(line):
            yield int(found.group(1)), found.group(2)


def _compile(folder: Path) -> None:
    """What the other process does."""
    # Here: a process that only waits for this one needs neither.
    from jvgen.preflight.topology import describe_for
    from jvgen.training.program import Program

    run = json.loads((folder / _RUN).read_text())
    for module in _modules(run["experiment"]):
        importlib.import_module(module)
    experiment = saved_config.from_json(run["experiment"])
    _, mesh = describe_for(experiment.mesh, run["topology"], run["slices"])
    lowered = Program.build(experiment, mesh).lower(experiment.data.buckets[0])
    lowered.compile(compiler_options={"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True})


def _end_with(parent: int) -> None:
    """End this process when the one that waits for it was killed."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    _compile(Path(sys.argv[1]))
