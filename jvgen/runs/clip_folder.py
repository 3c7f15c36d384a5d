"""Generated clips as files: their names, an index of how each was made, and which exist already."""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from jvgen.data.video_files import encode_image, encode_video
from jvgen.runs.generation import CLIPS_PER_PROMPT, slot_of
from jvgen.storage import Path, local_file, write_bytes, write_text
from jvgen.training.telemetry.json_lines import read_rows

MAX_PROMPTS = 1 << 19
INDEX = "index.jsonl"
# Endings that say that one file is meant, though only the first three are written.
MEDIA = (".mp4", ".png", ".npy", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".gif", ".jpg", ".jpeg")
MAX_NAME_BYTES = 255  # on every common file system

# "numbered": 0003_01_a_red_ball.mp4; "vbench": a red ball-1.mp4, where VBench's evaluation looks for it.
Naming = Literal["numbered", "vbench"]


@dataclasses.dataclass(frozen=True)
class Clip:
    """One clip to make: its file, the number of its prompt, and the slot that its random draws belong to."""

    path: Path
    prompt: int
    slot: int


def plan_clips(
    prompts: Sequence[str], count: int, out: Path, *, frames: int, batch: int, naming: Naming = "numbered"
) -> list[Clip]:
    """Every clip of a request, `count` for each prompt.

    Args:
      out: a folder, or, for one clip, a file (.mp4, .png for a single frame, .npy for floats).
      frames: per clip.
      batch: clips per batch.

    Raises:
      ValueError: a count out of range, a file that exists, a prompt that cannot be a file name.
    """
    if not 1 <= count <= CLIPS_PER_PROMPT or not 1 <= len(prompts) <= MAX_PROMPTS or batch < 1:
        raise ValueError(
            f"--clips-per-prompt {count}, --batch-size {batch}, {len(prompts)} prompts: allowed are 1 to "
            f"{CLIPS_PER_PROMPT} clips per prompt, batches of at least 1 and 1 to {MAX_PROMPTS} prompts."
        )
    suffix = ".mp4" if frames > 1 else ".png"
    if is_one_file(out):
        if len(prompts) * count != 1:
            raise ValueError(f"--out {out}: one file, but {len(prompts) * count} clips are asked for; give a folder.")
        if out.suffix not in (suffix, ".npy"):
            raise ValueError(f"--out {out}: {frames} frames are written as {suffix}; change the ending.")
        if out.exists():
            raise ValueError(f"--out {out}: exists already; remove it, or give another name.")
        return [Clip(out, 0, 0)]
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file, and neither .mp4 nor .png; give a folder.")
    names = _vbench_name if naming == "vbench" else _numbered_name
    clips = [
        Clip(out / names(prompt, p, i, suffix), p, slot_of(p, i))
        for p, prompt in enumerate(prompts)
        for i in range(count)
    ]
    assert len({clip.path for clip in clips}) == len(clips), "prompts are unique where names are made of them alone"
    return clips


def is_one_file(out: Path) -> bool:
    """Whether `--out` names one clip and not a folder."""
    return out.suffix.lower() in MEDIA and not out.is_dir()


def note_clips(out: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the index before the clips, so that an interrupted call can be told from a different request.

    Args:
      out: folder of the clips, created if needed.
      rows: one per clip: `{"file": name, ...}` and how that clip is made.

    Raises:
      ValueError: the folder holds clips made with other settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    index = out / INDEX
    before = read_rows(index)
    known = {row["file"]: row for row in before}
    for row in rows:
        if (out / row["file"]).exists() and known.get(row["file"]) != row:
            old = known.get(row["file"], {})
            changed = [name for name in {**old, **row} if old.get(name) != row.get(name)] if old else []
            differ = ", ".join(f"{name} = {old.get(name)!r}, now {row.get(name)!r}" for name in changed)
            raise ValueError(
                f"--out {out}: {row['file']} exists and was made with other settings "
                f"({differ or 'not in the index'}); give another folder, or remove this one."
            )
    listed = {row["file"] for row in rows}
    kept = [row for row in before if row["file"] not in listed and (out / row["file"]).exists()]
    write_text(index, "".join(json.dumps(row) + "\n" for row in [*kept, *rows]))


def write_clip(path: Path, clip: np.ndarray, frames_per_second: float) -> None:
    """Write a clip `F H W 3` atomically: uint8 as a video or a picture, floats as .npy."""
    if path.suffix == ".npy":
        with local_file(path) as partial, partial.open("wb") as stream:
            np.save(stream, clip)
    else:
        write_bytes(path, encode_video(clip, frames_per_second) if len(clip) > 1 else encode_image(clip[0]))


def _numbered_name(prompt: str, number: int, index: int, suffix: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")[:48]
    return f"{number:04d}_{index:02d}_{slug}{suffix}"


def _vbench_name(prompt: str, number: int, index: int, suffix: str) -> str:
    name = f"{prompt}-{index}{suffix}"
    if "/" in prompt or "\0" in prompt or len(name.encode()) > MAX_NAME_BYTES:
        raise ValueError(
            f"prompt {number}, {prompt[:60]!r}: cannot be part of a file name, as VBench has it (a slash, or more than "
            f"{MAX_NAME_BYTES} bytes); use --naming numbered."
        )
    return name
