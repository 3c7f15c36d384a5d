"""Scores of clips for data sets that have none: motion, sharpness and near-duplicates, as columns of the index."""

import contextlib
import dataclasses
import functools
import shutil
from collections.abc import Sequence

import cv2
import numpy as np

from jvgen.data.builders.jobs import Corrupt
from jvgen.data.builders.near_duplicates import near_duplicates
from jvgen.data.builders.workers import in_order
from jvgen.data.store.array_files import read_arrays, write_arrays
from jvgen.data.store.index import Column
from jvgen.data.store.index_files import set_columns
from jvgen.data.store.records import Record
from jvgen.data.store.shards import CorruptShard
from jvgen.data.store.sources import Source, open_source
from jvgen.data.store.strings import Text
from jvgen.data.video_files import DecodeError, decode_window
from jvgen.storage import Path, as_path, is_remote
from jvgen.terminal import Report

SCORES = ("motion", "sharpness", "duplicates")
DUPLICATE_OF = "duplicate_of"
_FLOW_SIDE, _SHARPNESS_SIDE = 128, 256  # shorter side at which flow and sharpness are measured, in pixels
_PAIRS = 6  # pairs of neighboring frames of which the flow is measured
_HASHED = (1 / 6, 1 / 2, 5 / 6)  # parts of a clip whose frames are hashed
_BITS = 64  # of the hash of a frame
_CHUNK = 256  # records that are scored, and kept on disk, at a time


@dataclasses.dataclass(frozen=True)
class Scored:
    """What `score` did.

    Attributes:
      columns: that were written.
      records: of the split.
      unreadable: ids of records that could not be decoded, whose scores are missing.
      duplicates: records that are near-duplicates of an earlier one.
    """

    columns: tuple[str, ...]
    records: int
    unreadable: tuple[str, ...]
    duplicates: int


def score(
    folder: str | Path,
    split: str = "train",
    scores: Sequence[str] = SCORES,
    workers: int = 1,
    progress: Report | None = None,
) -> Scored:
    """Compute scores of all records of a split and write them to its index; the digest does not change.

    Columns:

    * `motion`: mean length of the optical flow (DIS) between neighboring frames, in shorter sides of the frame per
      second; missing for images.
    * `sharpness`: variance of the Laplacian of gray frames whose shorter side is 256 pixels, the median of three.
    * `duplicate_of`: id of the first record of which this one is a near-duplicate by perceptual hashes of three frames;
      missing for the others, so that `duplicate_of is None` takes one of each kind.

    Of several views the first is scored. A call that is killed goes on where it was.

    Args:
      workers: processes.
      progress: called with (done, total).

    Raises:
      ValueError: an unknown score, a data set in a bucket or of 0.1.0, records that end the process that reads them.
    """
    unknown = [name for name in scores if name not in SCORES]
    if unknown or not scores:
        raise ValueError(f"scores = {tuple(scores)}: some of {', '.join(SCORES)}.")
    if is_remote(as_path(folder)):
        raise ValueError(f"{folder}: scores are written to local data sets; copy it, and upload its index files.")
    source = open_source(folder, split)
    index = source.index
    if not index.shards:
        raise ValueError(f"{folder}: its index is of 0.1.0; run `jvgen data upgrade {folder}` first.")
    kept = as_path(source.folder) / f"index-{split}" / f".scores-{index.digest[:12]}"
    kept.mkdir(parents=True, exist_ok=True)
    chunks = [range(start, min(start + _CHUNK, len(index))) for start in range(0, len(index), _CHUNK)]
    missing = [rows for rows in chunks if not _file(kept, rows).is_file()]
    done = len(index) - sum(map(len, missing))
    scored = in_order(functools.partial(_scored, str(source.folder), split), missing, workers, processes=True)
    with contextlib.closing(scored):
        for rows, arrays in zip(missing, scored, strict=True):
            if isinstance(arrays, Corrupt):
                raise ValueError(
                    f"{folder} [{split}]: rows {rows[0]} to {rows[-1]} cannot be scored: {arrays.reason}. What is "
                    "scored is kept."
                )
            write_arrays(_file(kept, rows), arrays)
            done += len(rows)
            if progress is not None:
                progress(done, len(index))
    parts = [read_arrays(_file(kept, rows)) for rows in chunks]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    columns: dict[str, Column] = {name: joined[name] for name in ("motion", "sharpness") if name in scores}
    duplicates = 0
    if "duplicates" in scores:
        first = near_duplicates(joined["hash"], joined["readable"])
        duplicates = int(np.count_nonzero(first >= 0))
        columns[DUPLICATE_OF] = Text.of("" if row < 0 else index.id[row] for row in first.tolist())
    set_columns(source.folder, split, columns)
    shutil.rmtree(kept)
    unreadable = tuple(index.id[row] for row in np.flatnonzero(~joined["readable"]).tolist())
    return Scored(tuple(columns), len(index), unreadable, duplicates)


def motion(frames: Sequence[np.ndarray], seconds: Sequence[float]) -> float:
    """Mean speed of the flow of n pairs of frames, in shorter sides per second; NaN without any.

    Args:
      frames: 2 n of uint8 (H, W, 3).
      seconds: n, between the frames of each pair.
    """
    grays = [_gray(frame, _FLOW_SIDE) for frame in frames]
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    speeds = [
        float(np.linalg.norm(flow.calc(one, other, None), axis=-1).mean()) / (_FLOW_SIDE * between)
        for one, other, between in zip(grays[::2], grays[1::2], seconds, strict=True)
    ]
    return float(np.mean(speeds)) if speeds else float("nan")


def sharpness(frames: Sequence[np.ndarray]) -> float:
    """Median variance of the Laplacian of frames, uint8 (H, W, 3)."""
    return float(np.median([cv2.Laplacian(_gray(f, _SHARPNESS_SIDE), cv2.CV_64F).var() for f in frames]))


def perceptual_hash(frame: np.ndarray) -> int:
    """64 bits: which low frequencies of a frame, uint8 (H, W, 3), are above their median."""
    small = cv2.resize(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), (32, 32), interpolation=cv2.INTER_AREA)
    low = cv2.dct(small.astype(np.float32))[:9, :9].reshape(-1)[1 : _BITS + 1]
    return int("".join("01"[bit] for bit in (low > np.median(low)).tolist()), 2)


def _scored(folder: str, split: str, rows: range) -> dict[str, np.ndarray]:
    source = _source(folder, split)
    scored = [_of_record(source, row) for row in rows]
    return {
        "motion": np.array([one[0] for one in scored], np.float64),
        "sharpness": np.array([one[1] for one in scored], np.float64),
        "hash": np.array([one[2] for one in scored], np.uint64).reshape(len(scored), len(_HASHED)),
        "readable": np.array([one[3] for one in scored], bool),
    }


def _of_record(source: Source, row: int) -> tuple[float, float, list[int], bool]:
    try:
        record = source.read(row)
        if not record.clips:
            raise DecodeError("has cached latents and no pixels")
        return (*_scores(record), True)
    except (DecodeError, CorruptShard):
        return float("nan"), float("nan"), [0] * len(_HASHED), False


def _scores(record: Record) -> tuple[float, float, list[int]]:
    """Motion, sharpness and hashes, with the frames decoded once."""
    places = [min(int(part * record.frames), record.frames - 1) for part in _HASHED]
    moves = record.frames > 1 and record.frames_per_second > 0
    pairs = np.unique(np.linspace(0, record.frames - 2, _PAIRS).astype(int)).tolist() if moves else []
    wanted = sorted({*places, *pairs, *(frame + 1 for frame in pairs)})
    frames = dict(zip(wanted, decode_window(record.clips[0], wanted), strict=True))
    seconds = [1 / record.frames_per_second] * len(pairs) if pairs else []
    if record.frame_times.size:
        seconds = np.diff(record.frame_times)[pairs].tolist()
    moved = motion([frames[n] for pair in pairs for n in (pair, pair + 1)], seconds)
    shown = [frames[place] for place in places]
    return moved, sharpness(shown), [perceptual_hash(frame) for frame in shown]


def _gray(frame: np.ndarray, side: int) -> np.ndarray:
    gray = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    scale = side / min(gray.shape)
    size = max(1, round(gray.shape[1] * scale)), max(1, round(gray.shape[0] * scale))
    return cv2.resize(gray, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)


@functools.lru_cache(maxsize=1)
def _source(folder: str, split: str) -> Source:
    return open_source(folder, split)


def _file(folder: Path, rows: range) -> Path:
    return folder / f"{rows.start:010d}-{rows.stop:010d}.npz"
