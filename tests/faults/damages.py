"""Damage files of a finished run and of its data, one at a time, and see what reading them gives."""

import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jvgen.config import ConfigError
from jvgen.data.stream.loader import Loader
from jvgen.data.stream.quarantine import TooManyFailures
from jvgen.parallel.mesh import make_mesh
from jvgen.training.checkpoint.manager import Checkpoints
from jvgen.training.checkpoint.reader import CheckpointError
from jvgen.training.checkpoint.restore import restore_state
from jvgen.training.experiment import load_experiment
from jvgen.training.program import Program
from tests.faults import tiny_run
from tests.faults.kills import Outcome
from tests.faults.tiny_run import SAVE_EVERY, STEPS

PREVIOUS = (STEPS - 1) // SAVE_EVERY * SAVE_EVERY
# What a user can act on: it names the file and what to do.
TOLD = (ConfigError, CheckpointError, TooManyFailures, ValueError, OSError)


def flip_bit(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def zero_block(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    start = draw.randrange(max(1, len(content) - 4096))
    content[start : start + 4096] = bytes(min(4096, len(content) - start))
    path.write_bytes(content)


def truncate(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])


DAMAGES = {"one bit flipped": flip_bit, "4 KiB zeroed": zero_block, "truncated": truncate}


def trials(
    what: str, original: Path, files: Callable[[Path], list[Path]], read: Callable[[Path], str], count: int, seed: int
) -> Iterator[Outcome]:
    """Damage a fresh copy of a folder `count` times in each way; `read` says what came of it, or raises.

    Half of the files are drawn evenly and half by their size, so that both small documents and arrays are hit.
    """
    draw = random.Random(seed)
    copy = original.with_name(f"{original.name}_damaged")
    for name, damage in DAMAGES.items():
        outcome = Outcome(f"{what}: {name}", trials=count, results=Counter())
        for number in range(count):
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(original, copy)
            found = sorted(path for path in files(copy) if path.stat().st_size)
            sizes = [path.stat().st_size for path in found] if number % 2 else None
            victim = draw.choices(found, sizes)[0]
            damage(victim, draw)
            try:
                result = read(copy)
            except TOLD as error:
                result = "told" if str(error).strip() else "told nothing"
            except Exception as error:
                result = "crash"
                outcome.failures.append(f"{victim.relative_to(copy)}: {type(error).__name__}: {str(error)[:300]}")
            if result.startswith("silent") or result == "told nothing":
                outcome.failures.append(f"{victim.relative_to(copy)}: {result}")
            outcome.results[result] += 1
        yield outcome
    shutil.rmtree(copy, ignore_errors=True)


class CheckpointReader:
    """Restores the training state of a run directory and compares it with that of the run."""

    def __init__(self, folder: Path, data: Path):
        self.experiment = load_experiment(tiny_run.CONFIG, tiny_run.assignments(data))
        self.program = Program.build(self.experiment, make_mesh(self.experiment.mesh, jax.devices()[:1]))
        self.right = {step: tiny_run.saved_arrays(folder, step) for step in (STEPS, PREVIOUS)}

    def files(self, folder: Path) -> list[Path]:
        return [path for path in (folder / "checkpoints" / str(STEPS)).rglob("*") if path.is_file()]

    def read(self, folder: Path) -> str:
        from jvgen.training.checkpoint import identity

        checkpoints = Checkpoints(folder, self.experiment.checkpoint, log=lambda message: None)
        try:
            document = identity.run_document(self.experiment, self.program.task)
            state = restore_state(self.program, checkpoints, _AnyData(), document, False, lambda message: None)
        finally:
            checkpoints.close()
        step = int(state.step)
        right = self.right.get(step)
        if right is None or any(not np.array_equal(np.asarray(a), right[n]) for n, a in state.saved().items()):
            return f"silent: wrong state of step {step}"
        return "harmless" if step == STEPS else "previous checkpoint"


class _AnyData:
    def check_state(self, saved: dict[str, Any]) -> None:
        pass


class DataReader:
    """Reads batches of a data set and compares them with those of the undamaged one."""

    def __init__(self, data: Path):
        self.experiment = load_experiment(tiny_run.CONFIG, tiny_run.assignments(data))
        self.right = self._batches(data)

    def shards(self, folder: Path) -> list[Path]:
        return [path for path in folder.rglob("*.array_record*") if "train" in path.name]

    def documents(self, folder: Path) -> list[Path]:
        return [path for path in folder.rglob("*") if path.is_file() and ".array_record" not in path.name]

    def read(self, folder: Path) -> str:
        found = self._batches(folder)
        same = [
            all(np.array_equal(a[n], b[n]) for n in a) for (a, _), (b, _) in zip(found, self.right, strict=True)
        ]  # fmt: skip
        if all(same):
            return "identical"
        substituted = [bool(substitutes) for _, substitutes in found]
        if any(not equal and not other for equal, other in zip(same, substituted, strict=True)):
            return "silent: another batch"
        return "quarantined"

    def _batches(self, folder: Path) -> list[tuple[dict[str, np.ndarray], int]]:
        experiment = load_experiment(tiny_run.CONFIG, tiny_run.assignments(folder))
        data = experiment.data.replace(error_budget=0.2)
        loader = Loader(data, seed=experiment.seed, preprocess=experiment.task.build().preprocess)
        with loader.batches(0, 12) as batches:
            return [({name: a.copy() for name, a in batch.arrays.items()}, batch.substitutes) for batch in batches]
