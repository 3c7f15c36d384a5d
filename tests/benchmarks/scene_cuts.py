"""Finding cuts: precision and recall on films made of pieces of scenes, beside PySceneDetect where it is installed."""

import itertools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np

from jvgen.data.cuts import find_cuts
from jvgen.data.scenes.scenes import SceneConfig, scene_record
from jvgen.data.video_files import decode_window, encode_video, read_frames
from tests.benchmarks.machine import Settings
from tests.benchmarks.report import Result

HEIGHT, WIDTH = 144, 256
SHORTEST, LONGEST = 8, 24  # frames of a piece
REAL = "JVGEN_REAL_DATA"


def sources(quick: bool) -> list[np.ndarray]:
    """Clips without cuts: rendered scenes, and recorded clips of the folder that `JVGEN_REAL_DATA` names."""
    config = SceneConfig(height=HEIGHT, width=WIDTH, frames=2 * LONGEST, kinds={"static": 0.5, "dynamic": 0.5})
    kept = [decode_window(scene_record(config, 3, n).clips[0], range(2 * LONGEST)) for n in range(2 if quick else 8)]
    if REAL in os.environ and not quick:
        for path in sorted((Path(os.environ[REAL]) / "video").glob("*.mp4")):
            frames = itertools.islice(read_frames(path), 4 * LONGEST)
            kept.append(
                np.stack([cv2.resize(frame, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA) for frame in frames])
            )
    return kept


def film(clips: Sequence[np.ndarray], pieces: int, seed: int) -> tuple[np.ndarray, list[int]]:
    """Pieces of different clips one after the other, encoded and decoded, and the frames at which they begin."""
    rng = np.random.default_rng(seed)
    parts, before = [], -1
    for _ in range(pieces):
        clip = int(rng.choice([n for n in range(len(clips)) if n != before]))
        length = int(rng.integers(SHORTEST, LONGEST + 1))
        start = int(rng.integers(0, len(clips[clip]) - length + 1))
        parts.append(clips[clip][start : start + length])
        before = clip
    cuts = np.cumsum([len(part) for part in parts])[:-1].tolist()
    encoded = encode_video(np.concatenate(parts), 24, quality=23)
    return decode_window(encoded, range(cuts[-1] + len(parts[-1]))), cuts


def detectors() -> dict[str, Callable[[np.ndarray], list[int]]]:
    """Functions from frames to the frames that begin a scene."""
    found: dict[str, Callable[[np.ndarray], list[int]]] = {"jvgen": find_cuts}
    try:
        import scenedetect
    except ImportError:
        return found

    def detect(make: Callable[[], object]) -> Callable[[np.ndarray], list[int]]:
        def run(frames: np.ndarray) -> list[int]:
            detector, cuts = make(), []
            for number, frame in enumerate(frames):
                timecode = scenedetect.FrameTimecode(number, 24.0)
                cuts += detector.process_frame(timecode, cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
            cuts += detector.post_process(scenedetect.FrameTimecode(len(frames) - 1, 24.0))
            return sorted(getattr(cut, "frame_num", cut) for cut in cuts)

        return run

    found["PySceneDetect, AdaptiveDetector"] = detect(lambda: scenedetect.AdaptiveDetector(min_scene_len=1))
    found["PySceneDetect, ContentDetector"] = detect(lambda: scenedetect.ContentDetector(min_scene_len=1))
    return found


def run(settings: Settings) -> Result:
    """Counts over all films, and milliseconds a frame."""
    clips = sources(settings.quick)
    films = [film(clips, 6 if settings.quick else 28, seed) for seed in range(1 if settings.quick else 4)]
    rows = []
    for name, detect in detectors().items():
        right = found_in_all = frames = 0
        began = time.process_time()
        for pixels, cuts in films:
            found = detect(pixels)
            right += len(set(found) & set(cuts))
            found_in_all += len(found)
            frames += len(pixels)
        seconds = time.process_time() - began
        there = sum(len(cuts) for _, cuts in films)
        rows.append({
            "detector": name, "cuts": there, "found": found_in_all, "right": right, "recall": right / there,
            "precision": right / found_in_all if found_in_all else 1.0, "ms_per_frame": 1e3 * seconds / frames,
        })  # fmt: skip
    return Result("Cuts in films made of pieces", {"clips": len(clips), "size": f"{WIDTH}x{HEIGHT}"}, rows)
