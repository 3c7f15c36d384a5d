"""Read prompts from a text file with one per line, or from JSON in VBench's form; tell which are too long."""

import sys
from collections.abc import Sequence
from typing import Any

from jvgen.storage import Path, read_json, read_utf8
from jvgen.tasks.task import Task

# What VBench calls the text of an entry, and what other lists do.
KEYS = ("prompt_en", "prompt")
MAX_SHOWN = 200  # characters of a prompt's end that no network reads
MAX_LISTED = 5  # prompts of which the end is shown


def read_prompts(path: Path) -> list[str]:
    """The prompts in a file, in order, each once.

    Args:
      path: `.json`, a list of texts or of objects with "prompt_en" (VBench's `VBench_full_info.json`, which may list a
        prompt several times) or "prompt"; anything else is text with one prompt a line.

    Raises:
      UnreadableFile: not UTF-8, or not JSON.
      ValueError: no such file, no prompts in it, or JSON of another form.
    """
    if not path.is_file():
        raise ValueError(f"--prompts {path}: no such file; expected one prompt a line, or VBench's JSON.")
    if path.suffix == ".json":
        prompts = _from_json(path)
    else:
        prompts = [line.strip() for line in read_utf8(path).splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts {path}: has no prompts.")
    return list(dict.fromkeys(prompts))


def warn_of_truncated(task: Task, prompts: Sequence[str]) -> None:
    """Print to standard error which ends of prompts the task's text encoder does not read."""
    ends = [end for prompt in dict.fromkeys(prompts) if (end := task.truncated_text(prompt))]
    for end in ends[:MAX_LISTED]:
        shown = end if len(end) <= MAX_SHOWN else f"{end[:MAX_SHOWN]}..."
        print(f"warning: a prompt has more than {task.config.text.length} tokens; cut off: {shown!r}", file=sys.stderr)
    if len(ends) > MAX_LISTED:
        print(f"warning: {len(ends) - MAX_LISTED} more prompts are cut off", file=sys.stderr)


def _from_json(path: Path) -> list[str]:
    entries = read_json(path)
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise ValueError(f"--prompts {path}: expected a list of texts, or of objects with {' or '.join(KEYS)}.")
    return [_text(path, number, entry) for number, entry in enumerate(entries)]


def _text(path: Path, number: int, entry: Any) -> str:
    text = next((entry[key] for key in KEYS if key in entry), None) if isinstance(entry, dict) else entry
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"--prompts {path}: entry {number} has no text under {' or '.join(KEYS)}: {str(entry)[:80]}.")
    return text.strip()
