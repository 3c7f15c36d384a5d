"""A toy task on clips that the real loader reads; also a script that trains it as one of several processes."""

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import toys  # noqa: E402

from jvgen.data.store.records import Record  # noqa: E402
from jvgen.data.store.writer import Writer  # noqa: E402
from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig  # noqa: E402
from jvgen.data.video_files import encode_video  # noqa: E402
from jvgen.parallel import mesh  # noqa: E402
from jvgen.tasks.task import Task  # noqa: E402
from jvgen.training.experiment import Experiment  # noqa: E402
from jvgen.training.loop import train  # noqa: E402

# Axes of the mesh, and the processes that own its four devices in their order: tokens of every example split over both
# processes, as on a torus; and rows with a gap.
LAYOUTS = {"seq": ({"fsdp": 2, "seq": 2}, (0, 1, 1, 0)), "gap": ({"fsdp": 4}, (0, 1, 1, 0))}


class ClipTask(toys.ToyTask):
    """The toy task on the mean color of each row of pixels."""

    def preprocess(self, example: dict[str, Any]) -> dict[str, np.ndarray]:
        means = example["video"].astype(np.float32).mean((2, 3)) / 64 - 2
        return {"x": means, "record": np.int32(example["caption"])}


class ClipConfig(toys.ToyConfig):
    def build(self) -> Task:
        return ClipTask(self)


def build(folder: Path) -> Path:
    """A data set of 24 clips of noise with 6 frames, 16x16; their captions are their numbers."""
    with Writer(folder, description="noise") as writer:
        for number in range(32):
            pixels = np.random.default_rng(number).integers(0, 255, (6, 4, 4, 3), np.uint8)
            record = Record(
                id=f"clip-{number:02d}", kind="dynamic", clips=(encode_video(pixels.repeat(4, 1).repeat(4, 2), 8.0),),
                captions=(str(number),), frames_per_second=8.0, frames=6, height=16, width=16,
            )  # fmt: skip
            writer.add("train" if number < 24 else "validation", record)
    return folder


def experiment(data: Path, axes: dict[str, int]) -> Experiment:
    """Six steps on two batch shapes of these clips, with evaluation, on a mesh with these axes."""
    base = toys.experiment(**{"training.steps": 6, "training.evaluate_every": 6, "sharding.whole_examples": False})
    buckets = tuple(BucketConfig(frames=frames, height=16, width=16, batch_size=8) for frames in (4, 2))
    return base.replace(
        task=ClipConfig(),
        data=DataConfig(
            sources=(SourceConfig(path=str(data)),),
            evaluation_sources=(SourceConfig(path=str(data), split="validation"),),
            buckets=buckets,
            threads=2,
        ),
        training=base.training.replace(evaluation_batches=1),
        mesh=mesh.MeshConfig(**axes),
    )


def arranged(owners: tuple[int, ...], shape: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
    """The devices in the order of their owners."""
    of_process = {index: iter([d for d in devices if d.process_index == index]) for index in (0, 1)}
    ordered = np.empty(len(devices), object)
    ordered[:] = [next(of_process[owner]) for owner in owners]
    return ordered.reshape(shape)


def main() -> int:
    """Train as one of two processes: `clips.py DATA WORKDIR LAYOUT --process I --port P`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("layout", choices=LAYOUTS)
    parser.add_argument("--process", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    parsed = parser.parse_args()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{parsed.port}", 2, parsed.process)
    axes, owners = LAYOUTS[parsed.layout]
    mesh._arrange = functools.partial(arranged, owners)
    return train(experiment(parsed.data, axes), parsed.workdir)


if __name__ == "__main__":
    sys.exit(main())
