"""Cut recorded films into small clips that move, a data set to train and measure video autoencoders on.

    python -m tests.experiments.film_tiles FILMS --out data/tiles --held-out bear horse

Films are brought to one height and about one rate of frames, and cut into windows of frames and squares that do not
overlap. Squares in which hardly anything moves are left out: every autoencoder can code them. Whole films are held out.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np

from jvgen.data.builders.build_loop import BuildJob, Summary, build_dataset
from jvgen.data.builders.media import VIDEO_SUFFIXES
from jvgen.data.store.records import Record
from jvgen.data.video_files import encode_video, probe_file, read_frames


def tiles(film: Path, *, shorter_side: int, side: int, frames: int, rate: float, least: float) -> Iterator[np.ndarray]:
    """Clips of one film, uint8 (F H W 3).

    Args:
      film: video file.
      shorter_side: of the film before it is cut, in pixels.
      side, frames: of a clip.
      rate: frames a second at most; faster films lose all but every n-th frame.
      least: mean absolute difference of a clip's frames from those four before, in levels of 255, for it to be kept.
    """
    every = max(1, round(probe_file(film).frames_per_second / rate))
    window: list[np.ndarray] = []
    for number, frame in enumerate(read_frames(film)):
        if number % every:
            continue
        scale = shorter_side / min(frame.shape[:2])
        size = tuple(round(length * scale) for length in frame.shape[1::-1])
        window.append(cv2.resize(frame, size, interpolation=cv2.INTER_AREA))
        if len(window) < frames:
            continue
        clip, window = np.stack(window), []
        for top in range(0, clip.shape[1] - side + 1, side):
            for left in range(0, clip.shape[2] - side + 1, side):
                square = clip[:, top : top + side, left : left + side]
                if np.abs(square[4:].astype(np.int16) - square[:-4]).mean() >= least:
                    yield square


def build(films: Path, out: Path, held_out: Sequence[str], *, overwrite: bool = False, **cut: float) -> Summary:
    """Write the data set; films whose names contain one of `held_out` are its validation split.

    Raises:
      ValueError: no films, a name of `held_out` that no film has, or no film besides them.
    """
    found = sorted(path for path in films.iterdir() if path.suffix.lower() in VIDEO_SUFFIXES) if films.is_dir() else []
    if not found:
        raise ValueError(f"{films}: no video files ({', '.join(sorted(VIDEO_SUFFIXES))}) in this folder.")
    names = ", ".join(film.name for film in found)
    nobody = [name for name in held_out if not any(name in film.stem for film in found)]
    if nobody:
        raise ValueError(f"--held-out {' '.join(nobody)}: no film has this in its name; there are {names}.")
    measured = [film for film in found if any(name in film.stem for name in held_out)]
    if measured == found:
        raise ValueError(f"--held-out {' '.join(held_out)}: nothing is left to train on; there are {names}.")
    jobs = []
    for film in found:
        split = "validation" if film in measured else "train"
        clips = [(f"{film.stem} {number}", clip) for number, clip in enumerate(tiles(film, **cut))]
        jobs += [BuildJob(split, named[0], named) for named in clips]
        print(f"{film.name}: {len(clips)} clips, {split}")
    return build_dataset(
        out, jobs, _record, description="Squares of films, in which something moves.",
        metadata={"origin": "films", "options": {"held_out": list(held_out), **cut}}, workers=1, overwrite=overwrite,
    )  # fmt: skip


def _record(named: tuple[str, np.ndarray]) -> Record:
    name, clip = named
    frames, height, width, _ = clip.shape
    # All but lossless: what H.264 takes away must not be what is measured.
    encoded = encode_video(clip, 10.0, quality=4, full_color=True, keyframe_every=frames)
    return Record(
        id=name, kind="dynamic", clips=(encoded,), captions=(), frames_per_second=10.0, frames=frames, height=height,
        width=width,
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the data set that the arguments describe."""
    parser = argparse.ArgumentParser(prog="python -m tests.experiments.film_tiles", description=__doc__.split("\n")[0])
    parser.add_argument("films", type=Path, help="folder of video files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--held-out", nargs="+", required=True, metavar="NAME", help="films to measure on: parts of their names"
    )
    parser.add_argument("--shorter-side", type=int, default=144, help="of a film before it is cut, in pixels")
    parser.add_argument("--side", type=int, default=64, help="of a clip, in pixels")
    parser.add_argument("--frames", type=int, default=9, help="of a clip")
    parser.add_argument("--rate", type=float, default=15.0, help="frames a second, at most")
    parser.add_argument("--least", type=float, default=4.0, help="change within four frames, in levels of 255")
    parser.add_argument("--overwrite", action="store_true")
    chosen = vars(parser.parse_args(arguments))
    print(build(chosen.pop("films"), chosen.pop("out"), chosen.pop("held_out"), **chosen))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
