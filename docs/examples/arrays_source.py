"""A data source of one's own: clips that are stored as .npy arrays, `F H W 3` uint8, as a data set for training."""

from pathlib import Path

import numpy as np

from jvgen.data import Record, encode_video
from jvgen.data.builders.build_loop import BuildJob, Summary, assign_splits, build_dataset
from jvgen.data.image_files import DecodeError


def record_of(path: Path) -> Record:
    """The record of one file. Pure and picklable: it is called in processes, and again for work that was lost."""
    frames = np.load(path)
    if frames.ndim != 4 or frames.dtype != np.uint8:
        raise DecodeError(f"{path.name}: {frames.dtype} {frames.shape}, not uint8 F H W 3")  # counted, and listed
    count, height, width, _ = frames.shape
    return Record(
        id=path.stem,
        kind="dynamic",
        clips=(encode_video(frames, frames_per_second=8.0),),
        captions=(path.stem.replace("_", " "),),
        frames_per_second=8.0,
        frames=count,
        height=height,
        width=width,
    )


def build(folder: Path, out: Path) -> Summary:
    """The data set: parts, processes, resuming and Ray come with `build_dataset`."""
    paths = sorted(folder.glob("*.npy"))
    splits = assign_splits([path.stem for path in paths], validation=0.25)
    jobs = [BuildJob(split, path.stem, path, path=path) for split, path in zip(splits, paths, strict=True)]
    return build_dataset(
        out, jobs, record_of, description="Clips from arrays.", metadata={"origin": "arrays"}, error_budget=0.5
    )
