"""Building a data set: threads against processes, a build that goes on, parts and their merge, colors."""

import functools
import io
import tempfile
import time
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from jvgen.data.builders import units
from jvgen.data.builders.assembly import merge_parts
from jvgen.data.builders.build_loop import Execution, Summary
from jvgen.data.builders.folders import find_media
from jvgen.data.builders.media import VideoOptions, build_media, video_records
from jvgen.data.video_files import encode_video
from jvgen.data.video_pixels import EXACT, PixelConverter
from tests.benchmarks.machine import Settings
from tests.benchmarks.report import Result


def folder_of_clips(folder: Path, count: int, frames: int, height: int, width: int) -> None:
    """Clips of a moving pattern, with captions."""
    rng = np.random.default_rng(0)
    base = np.kron(rng.integers(0, 255, (height // 8, width // 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    clip = encode_video(np.stack([np.roll(base, 2 * n, axis=1) for n in range(frames)]), 24, keyframe_every=250)
    for number in range(count):
        (folder / f"{number:05d}.mp4").write_bytes(clip)
        (folder / f"{number:05d}.txt").write_text(f"pattern {number}")


def run(settings: Settings) -> Result:
    """Rates of builds of the same clips."""
    count, frames, height, width = (16, 12, 64, 96) if settings.quick else (96, 96, 480, 720)
    rows = []
    with tempfile.TemporaryDirectory() as text:
        root = Path(text)
        (root / "in").mkdir()
        folder_of_clips(root / "in", count, frames, height, width)

        def timed(case: str, out: str, options: VideoOptions, processes: bool, **execution) -> Summary:
            start = time.perf_counter()
            summary = _built(root / "in", root / out, options, processes, settings.cores, Execution(**execution))
            seconds = time.perf_counter() - start
            rows.append({"case": case, "seconds": seconds, "clips_per_s": count / seconds, "mean_difference": None})
            return summary

        smaller = VideoOptions(shorter_side=256, validation=0.0)
        timed("as they are, threads", "a", VideoOptions(validation=0.0), False)
        timed("as they are, processes", "b", VideoOptions(validation=0.0), True)
        one = timed("--shorter-side 256, threads", "c", smaller, False)
        two = timed("--shorter-side 256, processes", "d", smaller, True)
        assert one.digests == two.digests
        _interrupted(root, smaller, settings.cores)
        timed("the rest of it, killed after 3/4 of its units", "e", smaller, True, jobs_per_unit=8)
        parts = [
            _built(root / "in", root / "f", smaller, True, settings.cores, Execution(part, 4, jobs_per_unit=8)).out
            for part in (1, 2, 3, 4)
        ]
        start = time.perf_counter()
        merged = merge_parts(parts, root / "f")
        rows.append(
            {
                "case": "merge of 4 parts",
                "seconds": time.perf_counter() - start,
                "clips_per_s": None,
                "mean_difference": None,
            }
        )
        assert merged.digests == one.digests
        rows += _colors((root / "in" / "00000.mp4").read_bytes(), settings.repeats)
    size = {"clips": count, "frames": frames, "size": f"{width}x{height}"}
    return Result("Building a data set", size, rows, shown=("case", "seconds", "clips_per_s", "mean_difference"))


def _built(
    folder: Path, out: Path, options: VideoOptions, processes: bool, workers: int, execution: Execution
) -> Summary:
    media = find_media(folder)
    return build_media(
        media, functools.partial(video_records, options=options), out, options, description="benchmark",
        origin="videos", folder=folder, stored={}, workers=workers, processes=processes, execution=execution,
    )  # fmt: skip


def _interrupted(root: Path, options: VideoOptions, workers: int) -> None:
    """A build that ends, without a word, after three quarters of its units."""

    class Killed(BaseException):
        pass

    commit, made = units._commit, []

    def counted(folder, done):
        commit(folder, done)
        made.append(done)
        if len(made) == -(-len(list((root / "in").glob("*.mp4"))) // 8) * 3 // 4:
            raise Killed

    units._commit = counted
    try:
        _built(root / "in", root / "e", options, True, workers, Execution(jobs_per_unit=8))
    except Killed:
        pass
    finally:
        units._commit = commit


def _colors(clip: bytes, repeats: int) -> list[dict]:
    """Milliseconds of processor time a frame, and the mean difference to FFmpeg's exact conversion."""
    with av.open(io.BytesIO(clip)) as container:
        frames = [frame for frame, _ in zip(container.decode(video=0), range(12), strict=False)]
    fast, exact, ours = VideoReformatter(), VideoReformatter(), PixelConverter()
    sides = {
        "colors, FFmpeg's default": lambda frame: fast.reformat(frame, format="rgb24", threads=1).to_ndarray(),
        "colors, FFmpeg's exact": lambda frame: exact.reformat(
            frame, format="rgb24", threads=1, interpolation=EXACT
        ).to_ndarray(),
        "colors, jvgen": ours,
    }
    wanted = np.stack([sides["colors, FFmpeg's exact"](frame) for frame in frames]).astype(int)
    rows = []
    for name, convert in sides.items():
        seconds = []
        for _ in range(repeats):
            start = time.process_time()
            found = [convert(frame) for frame in frames]
            seconds.append((time.process_time() - start) / len(frames))
        bias = float((np.stack(found) - wanted).mean())
        rows.append({"case": name, "seconds": min(seconds), "clips_per_s": None, "mean_difference": bias})
    return rows
