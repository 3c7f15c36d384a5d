"""How long a checkpoint holds training up, what it costs while it is written, and how long restoring takes."""

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from jvgen.training.checkpoint.manager import Checkpoints
from jvgen.training.config import CheckpointConfig
from jvgen.training.state import TrainState, size_of
from tests.benchmarks.dit_step import QUICK, Size, case_of
from tests.benchmarks.machine import Settings
from tests.benchmarks.report import Result
from tests.benchmarks.step_timing import OurStep

FULL = Size(2, (4, 16, 16), layers=4, heads=8, text=32, text_width=128, condition=256)


def run(settings: Settings) -> Result:
    """Saves during training, restores of the last one, and torch.save of as many bytes."""
    (size,) = QUICK.values() if settings.quick else [FULL]
    # The quick one is the program that dit_step compiles.
    step = OurStep(case_of("checkpoint", size), ema=() if settings.quick else (0.999,))
    for _ in range(2):
        step()
    alone = [_seconds(step) for _ in range(settings.repeats)]
    usual = statistics.median(alone)
    _, state_bytes = size_of(step.state.saved())
    parameters, _ = size_of(step.state.parameters)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), CheckpointConfig(keep_last=1), log=_refuse)
        # The first one compiles the digests.
        first, *saves = [_save(step, checkpoints, number, usual) for number in range(settings.repeats + 1)]
        checkpoints.close()
        disk = max(_bytes_of(path) for path in (Path(folder) / "checkpoints").iterdir() if path.is_dir())
        restores = [_restore(step, Path(folder)) for _ in range(max(2, settings.repeats // 3))]
        dumps = [_torch_save(step.state, Path(folder) / "state.pt") for _ in range(max(2, settings.repeats // 3))]
    stall, torch_stall = statistics.median(s["stall"] for s in saves), statistics.median(dumps)
    row: dict[str, Any] = {
        "parameters": parameters,
        "state_MiB": state_bytes / 2**20,
        "disk_MiB": disk / 2**20,
        "step_s": usual,
        "stall_s": stall,
        "stall_min_s": min(s["stall"] for s in saves),
        "first_stall_s": first["stall"],
        "stall_steps": stall / usual,
        "written_after_s": statistics.median(s["written"] for s in saves),
        "cost_s": statistics.median(s["cost"] for s in saves),
        "share_every_1000": statistics.median(s["cost"] for s in saves) / (1000 * usual),
        "torch_save_s": torch_stall,
        "ratio_of_stalls": stall / torch_stall,
        "restore_s": statistics.median(restores),
        "restore_min_s": min(restores),
    }
    return Result(
        title="stall of an asynchronous save with digests, against torch.save of the same arrays",
        settings={"size": dataclasses.asdict(size), "arrays": len(step.state.saved())},
        rows=[row],
        samples={"steps_alone": alone, "first_save": first, "saves": saves, "restores": restores, "torch_saves": dumps},
        notes=(
            "state: parameters, two moments, one average, float32. stall_s: the loop is held up by digests and the",
            "copy to the host; stall_steps is that in steps. cost_s: stall and how much slower steps are until the",
            "checkpoint is complete; share_every_1000 is that as a share of the time of 1000 steps. torch.save",
            "blocks, and makes no digests. restore: read from the (warm) file cache, placed, and every digest",
            "verified.",
        ),
    )


def _seconds(action: Any) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _save(step: OurStep, checkpoints: Checkpoints, number: int, usual: float) -> dict[str, float]:
    """Save, and train on until the checkpoint is complete."""
    began = time.perf_counter()
    stall = checkpoints.save(number, step.state.saved(), {}, {"run": "benchmark"})
    beside = []
    # Orbax renames the folder when everything is in it.
    while not (checkpoints.folder / str(number)).is_dir():
        beside.append(_seconds(step))
        checkpoints.poll()
    written = time.perf_counter() - began
    checkpoints.wait()
    return {
        "stall": stall,
        "written": written,
        "steps_beside": len(beside),
        "cost": stall + sum(max(0.0, seconds - usual) for seconds in beside),
    }


def _refuse(line: str) -> None:
    raise AssertionError(line)


def _restore(step: OurStep, folder: Path) -> float:
    began = time.perf_counter()
    checkpoints = Checkpoints(folder, CheckpointConfig(keep_last=1), log=_refuse)
    restored = checkpoints.restore(step.program.abstract_state().saved())
    jax.block_until_ready(restored.arrays)
    seconds = time.perf_counter() - began
    checkpoints.close()
    return seconds


def _torch_save(state: TrainState, path: Path) -> float:
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in state.saved().items()}
    seconds = _seconds(lambda: torch.save(tensors, path))
    path.unlink()
    return seconds


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
