"""Clips per second per core: our Loader, and a PyTorch DataLoader with PyAV or torchcodec on the same windows."""

import dataclasses
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from jvgen.data.builders.folders import build_videos
from jvgen.data.builders.media import VideoOptions
from jvgen.data.store.sources import open_source
from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.data.stream.loader import Loader
from jvgen.data.video_files import encode_video
from tests.benchmarks import readers, timing
from tests.benchmarks.machine import Settings, children, peak_memory_mib, private_memory_mib, usable_cores
from tests.benchmarks.report import Result
from tests.benchmarks.torch_clips import EXACT, Clips, Window, has_torchcodec, read


@dataclasses.dataclass(frozen=True)
class Size:
    """Size of the files and of the windows read from them.

    Attributes:
      clips: number of files.
      recorded: frames, height and width of each file.
      window: frames, height and width of an example.
      batch, batches: clips per batch, batches per timed pass.
    """

    clips: int
    recorded: tuple[int, int, int]
    window: tuple[int, int, int]
    batch: int
    batches: int


QUICK = Size(clips=4, recorded=(30, 48, 80), window=(5, 32, 32), batch=2, batches=2)
FULL = {
    "456x256": Size(clips=24, recorded=(96, 256, 456), window=(17, 224, 224), batch=8, batches=8),
    "1280x720": Size(clips=8, recorded=(96, 720, 1280), window=(17, 480, 720), batch=4, batches=4),
}
FRAMES_PER_SECOND = 24.0


def make_files(folder: Path, size: Size) -> None:
    """H.264 files of a moving texture, with a keyframe every second."""
    frames, height, width = size.recorded
    folder.mkdir()
    for number in range(size.clips):
        rng = np.random.default_rng(number)
        coarse = rng.integers(0, 255, (height // 6, width // 6, 3), np.uint8)
        wide = cv2.resize(coarse, (2 * width, 2 * height), interpolation=cv2.INTER_CUBIC)
        steps = np.linspace(0, 1, frames)
        tops, lefts = ((height - 1) * np.abs(np.sin(3 * steps))).astype(int), ((width - 1) * steps).astype(int)
        clip = np.stack([wide[y : y + height, x : x + width] for y, x in zip(tops, lefts, strict=True)])
        (folder / f"{number:03d}.mp4").write_bytes(encode_video(clip, FRAMES_PER_SECOND))


def windows_of(loader: Loader, files: Path, ids: np.ndarray, size: Size) -> list[Window]:
    """The clips of our plan, in order, as windows of files."""
    _, height, width = size.recorded
    frames, *fitted = size.window
    scale = max(fitted[0] / height, fitted[1] / width)
    scaled = (max(fitted[0], round(height * scale)), max(fitted[1], round(width * scale)))
    windows = []
    for step in range(size.batches):
        rows = loader.plan.at(step).row
        for slot in range(size.batch):
            spec = loader.plan.clip_spec(step, slot)
            room = (scaled[0] - fitted[0] + 1, scaled[1] - fitted[1] + 1)
            corner = (int(spec.crop_y * room[0]), int(spec.crop_x * room[1]))
            path = str(files / str(ids[rows[slot]]))
            windows.append(Window(path, spec.start, spec.stride, frames, scaled, corner, tuple(fitted)))
    return windows


class OurPass:
    """One pass over the batches with our Loader."""

    def __init__(self, config: DataConfig, size: Size, threads: int):
        self.loader = Loader(config.replace(threads=threads, prefetch=2), seed=0, preprocess=readers.pixels)
        self.batches = size.batches

    def __call__(self) -> np.ndarray:
        with self.loader.batches(0, self.batches) as batches:
            for batch in batches:
                last = batch.arrays["video"]
        return last


class TorchPass:
    """One pass over the same windows with a DataLoader; its workers persist between passes."""

    def __init__(self, windows: list[Window], size: Size, workers: int, decoder: str = "pyav"):
        options = {"multiprocessing_context": "spawn", "persistent_workers": True} if workers else {}
        self.loader = torch.utils.data.DataLoader(
            Clips(windows, decoder), batch_size=size.batch, num_workers=workers, **options
        )

    def __call__(self) -> np.ndarray:
        for batch in self.loader:
            last = batch
        return last.numpy()


def _of_size(name: str, size: Size, settings: Settings) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    frames, height, width = size.window
    decoders = ["pyav", "pyav, exact colors", *(["torchcodec"] if has_torchcodec() else [])]
    with tempfile.TemporaryDirectory() as folder:
        files, out = Path(folder) / "files", Path(folder) / "dataset"
        make_files(files, size)
        build_videos(files, out, VideoOptions(captions_optional=True, validation=0.0), workers=1)
        config = DataConfig(
            sources=(SourceConfig(path=str(out)),),
            buckets=(BucketConfig(frames=frames, height=height, width=width, batch_size=size.batch),),
        )
        loader = Loader(config, seed=0, preprocess=readers.pixels)
        windows = windows_of(loader, files, open_source(out, "train").index.id, size)
        rows, samples = [], {}
        available = usable_cores()
        memory = worker_memory_mib(config, size, windows, [name for name in decoders if "exact" not in name])
        for cores in (1, 2)[: min(2, settings.cores)]:
            # Threads and workers started from here on are restricted to these cores too.
            os.sched_setaffinity(0, available[:cores])
            workers = 0 if cores == 1 else cores
            sides: dict[str, Any] = {"ours": OurPass(config, size, cores)}
            sides |= {decoder: TorchPass(windows, size, workers, decoder) for decoder in decoders}
            last = {side: run() for side, run in sides.items()}
            # Ours have exact colors; theirs by default are FFmpeg's faster ones, darker by some levels.
            exact = np.stack([read(window, EXACT) for window in windows[-size.batch :]])
            difference = float(np.abs(last["ours"].astype(int) - exact.astype(int)).mean())
            assert last["ours"].shape == exact.shape and difference <= 1, f"the pixels differ by {difference}"
            assert all(np.abs(pixels.astype(int) - exact.astype(int)).mean() <= 6 for pixels in last.values())
            measured = timing.in_turns(sides, settings.repeats)
            samples[f"{name} {cores}"] = {side: dataclasses.asdict(sample) for side, sample in measured.items()}
            clips, mine = size.batch * size.batches, measured["ours"]
            for decoder in decoders:
                other = measured[decoder]
                rows.append(
                    {
                        "size": name,
                        "cores": cores,
                        "ours": f"threads={cores}",
                        "torch": f"{decoder}, num_workers={workers}",
                        "ours_clips_s_core": clips / mine.median / cores,
                        "ours_best": clips / mine.least / cores,
                        "torch_clips_s_core": clips / other.median / cores,
                        "torch_best": clips / other.least / cores,
                        "ours_cpu_ms_clip": 1000 * statistics.median(mine.processor) / clips,
                        "torch_cpu_ms_clip": 1000 * statistics.median(other.processor) / clips,
                        "ratio_of_clips_s": other.median / mine.median,
                        "ratio_of_best": other.least / mine.least,
                        **timing.ratio(mine, other),
                        "pixel_difference": difference,
                        "peak_memory_mib": peak_memory_mib(),
                        "ours_worker_mib": memory["ours"],
                        "torch_worker_mib": memory[decoder.partition(",")[0]],
                    }
                )
        os.sched_setaffinity(0, available)
    return rows, samples


def worker_memory_mib(config: DataConfig, size: Size, windows: list[Window], decoders: list[str]) -> dict[str, float]:
    """What one worker process of each side holds for itself after a pass, with two batches ahead."""
    found = {}
    loader = Loader(config.replace(threads=1, workers=1, prefetch=4), seed=0, preprocess=readers.pixels)
    before = set(children())
    with loader.batches(0, size.batches) as batches:
        for _ in batches:
            held = [private_memory_mib(child) for child in set(children()) - before]
            found["ours"] = max(found.get("ours", 0.0), *held)
    for decoder in decoders:
        before = set(children())
        side = TorchPass(windows, size, 1, decoder)
        side()
        found[decoder] = max(private_memory_mib(child) for child in set(children()) - before)
        del side
    return found


def run(settings: Settings) -> Result:
    """Two sizes; one core, and two where there are two."""
    torch.set_num_threads(1)
    rows, samples = [], {}
    sizes = {"80x48": QUICK} if settings.quick else FULL
    for name, size in sizes.items():
        found, measured = _of_size(name, size, settings)
        rows += found
        samples |= measured
    size = {name: dataclasses.asdict(size) for name, size in sizes.items()}
    return Result(
        title="clips/s/core; ratio of clips/s = ours / PyTorch, above 1 is faster",
        settings={"size": size},
        rows=rows,
        shown=(
            "size", "cores", "ours", "torch", "ours_clips_s_core", "ours_best", "torch_clips_s_core", "torch_best",
            "ours_cpu_ms_clip", "torch_cpu_ms_clip", "ratio_of_clips_s", "ratio_of_best", "middle_half",
            "pixel_difference", "ours_worker_mib", "torch_worker_mib",
        ),
        samples=samples,
        notes=(
            "the same windows of the same H.264 files, decoded, resized, cropped and batched; whole passes, from",
            "asking for the first batch to having the last. middle_half is of the rounds' ratios of time (ours /",
            "PyTorch, below 1 is faster). The process is restricted to 1 or 2 cores. PyTorch's workers persist between",
            "passes; our threads start with each pass. worker_mib: private memory of a worker process, one on each",
            "side, after a pass.",
        ),
    )  # fmt: skip
