"""Kill and stop runs at random moments, start them again, and compare them with runs that were left alone."""

import dataclasses
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np

from jvgen import exit_codes
from tests.faults import tiny_run
from tests.faults.tiny_run import Run
from tests.toys import rows_of

# Starts of one run in a row that ask for a restart: on a busy machine processes may not meet in time.
MAX_STARTS = 4


@dataclasses.dataclass
class Outcome:
    """What one kind of trial came to.

    Attributes:
      what: of which fault, and to how many processes.
      trials: number of signals that were sent.
      results: how often each result came.
      slowest: seconds from the signal until every process had ended, at most.
      failures: what must not happen, in words.
    """

    what: str
    trials: int = 0
    results: Counter = dataclasses.field(default_factory=Counter)
    slowest: float = 0.0
    failures: list[str] = dataclasses.field(default_factory=list)


class Kills:
    """Trials that share a data set, compiled programs and an undisturbed run for each number of processes."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.random = folder, random.Random(seed)
        self.data, self.compiled = folder / "scenes", folder / "compiled"
        self.undisturbed: dict[int, Path] = {}
        self.seconds: dict[int, float] = {}

    def prepare(self, processes: tuple[int, ...]) -> None:
        """Build the data, and train the undisturbed runs: twice, so that their time is that of compiled programs."""
        if not self.data.exists():
            tiny_run.build_data(self.data, tiny_run.environment(self.compiled))
        for count in processes:
            folder = self.undisturbed[count] = self.folder / f"undisturbed_{count}"
            measured = folder / "seconds.txt"
            for _ in range(0 if measured.exists() else 2):
                shutil.rmtree(folder, ignore_errors=True)
                run, codes = self.finish(folder, count)
                assert codes == [0] * count, run.text()
                measured.write_text(str(time.monotonic() - run.started))
            self.seconds[count] = float(measured.read_text())

    def start(self, folder: Path, processes: int) -> Run:
        return Run(folder, self.data, self.compiled, processes, devices=2 if processes > 1 else 1)

    def finish(self, folder: Path, processes: int) -> tuple[Run, list[int]]:
        """Start a run as a launcher does, again while it asks for a restart; returns the last start and its codes."""
        for _ in range(MAX_STARTS):
            run = self.start(folder, processes)
            codes = run.wait()
            if not set(codes) & {exit_codes.DEFAULT_RESTART, 134, -signal.SIGABRT}:
                break
        return run, codes

    def signals(self, number: int, count: int, processes: int, limit: float) -> Outcome:
        """Send a signal `count` times, up to six times per run; every run is then finished and compared.

        Args:
          number: SIGKILL or SIGTERM, to one process chosen at random.
          count: signals to send.
          processes: of each run.
          limit: seconds within which every process must have ended after a signal.
        """
        name = signal.Signals(number).name
        outcome, runs = Outcome(f"{name}, {processes} process{'es' * (processes > 1)}"), 0
        while outcome.trials < count:
            folder = self.folder / f"{name.lower()}_{processes}_{runs}"
            shutil.rmtree(folder, ignore_errors=True)
            runs += 1
            for _ in range(min(6, count - outcome.trials)):
                run = self.start(folder, processes)
                if not self._reach_moment(run, folder, processes):
                    assert run.wait() == [0] * processes, run.text()  # it was faster than the moment chosen for it
                    break
                outcome.trials += 1
                self._signal(run, number, processes, limit, outcome)
            run, codes = self.finish(folder, processes)
            self._compare(folder, run.steps, codes, processes, outcome)
        return outcome

    def _reach_moment(self, run: Run, folder: Path, processes: int) -> bool:
        """Wait for a random moment: of the clock, of a step, or of a save."""
        kind = self.random.choice(("clock", "step", "save", "save"))
        if kind == "clock":
            moment = run.started + self.random.uniform(0.0, self.seconds[processes])
            return run.wait_until(lambda: time.monotonic() >= moment)
        step = max(tiny_run.last_step(folder), 0) + self.random.randint(1, run.steps // 6)
        if kind == "step":
            return run.wait_until(lambda: tiny_run.last_step(folder) >= step)
        return run.wait_until(lambda: tiny_run.last_step(folder) >= step and tiny_run.is_saving(folder))

    def _signal(self, run: Run, number: int, processes: int, limit: float, outcome: Outcome) -> None:
        victim = self.random.randrange(processes)
        sent = time.monotonic()
        run.send(number, victim)
        codes = run.wait(limit)
        took = time.monotonic() - sent
        outcome.slowest = max(outcome.slowest, took)
        others = [code for place, code in enumerate(codes) if place != victim]
        outcome.results[f"codes {codes[victim]}{' and ' + str(others[0]) if others else ''}"] += 1
        if took >= limit:
            outcome.failures.append(f"not ended {limit:.0f} s after the signal to process {victim}: {codes}")
        if number == signal.SIGTERM and codes[victim] not in (0, 75, 143, -15):
            outcome.failures.append(f"SIGTERM to process {victim} gave {codes}: {run.text()[-2000:]}")

    def _compare(self, folder: Path, steps: int, codes: list[int], processes: int, outcome: Outcome) -> None:
        reference = self.undisturbed[processes]
        if codes != [0] * processes:
            outcome.failures.append(f"{folder.name} did not finish: {codes}")
        elif rows_of(folder) != rows_of(reference):
            outcome.failures.append(f"{folder.name}: rows of metrics.jsonl differ from the undisturbed run's")
        else:
            ours, theirs = (tiny_run.saved_arrays(place, steps) for place in (folder, reference))
            differ = [name for name in theirs if not np.array_equal(ours.get(name), theirs[name])]
            if differ:
                outcome.failures.append(f"{folder.name}: {len(differ)} arrays of step {steps} differ, e.g. {differ[0]}")
            else:
                outcome.results["runs finished bit-equal"] += 1
