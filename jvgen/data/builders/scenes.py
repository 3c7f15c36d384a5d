"""Builds data sets of rendered procedural scenes."""

import dataclasses
import functools
from pathlib import Path

from jvgen.data.builders.build_loop import BuildJob, Execution, Progress, Summary, available_cpus, build_dataset
from jvgen.data.scenes.scenes import SceneConfig, scene_id, scene_record


def build_scenes(
    out: str | Path,
    config: SceneConfig | None = None,
    *,
    train: int = 1000,
    validation: int = 64,
    seed: int = 0,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    execution: Execution | None = None,
) -> Summary:
    """Render procedural scenes (`jvgen.data.scenes.scenes`).

    Args:
      out: folder of the data set.
      config: appearance and content of the scenes.
      train, validation: number of scenes in each split.
      seed: seed of the scenes.
      workers: number of processes; by default one per CPU, or none besides this one for few scenes.
      overwrite, progress, execution: as in `jvgen.data.builders.build_loop.build_dataset`.

    Raises:
      ValueError: an invalid configuration, or `out` exists and may not be replaced.
    """
    config = config or SceneConfig()
    config.validate()
    if train < 1 or validation < 0:
        raise ValueError(
            f"train = {train}, validation = {validation}: train must be at least 1, validation at least 0."
        )
    # A process takes about a second to start: longer than rendering this many frames.
    few = (train + validation) * config.frames * config.views < 1500
    workers = (1 if few else available_cpus()) if workers is None else workers
    splits = ["train"] * train + ["validation"] * validation
    jobs = [BuildJob(split, scene_id(seed, index), index) for index, split in enumerate(splits)]
    return build_dataset(
        out,
        jobs,
        functools.partial(scene_record, config, seed),
        description="Procedural scenes with exact cameras, rendered by jvgen.",
        metadata={"origin": "scenes", "options": {"seed": seed, **dataclasses.asdict(config)}},
        workers=workers,
        processes=True,
        overwrite=overwrite,
        progress=progress,
        execution=execution,
    )
