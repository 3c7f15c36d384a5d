"""Digests of the files of an exported folder, in a file beside them that other libraries do not read.

Every folder of an export that holds files has a `jvgen_digests.json` for them, so that a network's subfolder that is
copied elsewhere keeps its own.
"""

import json
import pathlib
from collections.abc import Collection, Mapping

from jvgen import exit_codes
from jvgen.interop.digest import CARD_FILE, DIGESTS_FILE, file_digest
from jvgen.storage import Path, local_copy, read_json_object, write_text

_KEY = "sha256"


class DamagedExport(ValueError):
    """A file of an exported folder that is not what was exported."""

    exit_code = exit_codes.USER_ERROR


def write_digests(folder: pathlib.Path) -> None:
    """Write the digests of the files of a local folder and of each of its subfolders, which are all complete.

    The model card (README.md) is for people to edit and has none.
    """
    for place in (folder, *sorted(path for path in folder.rglob("*") if path.is_dir())):
        files = sorted(
            path for path in place.iterdir() if path.is_file() and path.name not in (DIGESTS_FILE, CARD_FILE)
        )
        if files:
            _write(place, {file.name: file_digest(file, reread=True) for file in files})


def add_digest(path: Path, digest: str) -> None:
    """Write the digest of one file to the digests of its folder, and keep those of other files there."""
    source = path.parent / DIGESTS_FILE
    _write(path.parent, (_read(local_copy(source)) if source.is_file() else {}) | {path.name: digest})


def check_digests(folder: Path, only: Collection[str] | None = None, *, reread: bool = False) -> None:
    """Check the files of a folder against its digests; nothing is checked in a folder without any.

    Args:
      folder: of one network, tokenizer or scheduler, which need not exist; subfolders are not looked at.
      only: names of the files to check; all by default.
      reread: read all files, also large ones that were read before (see `file_digest`).

    Raises:
      DamagedExport: a file is missing or has other content; all are named.
      UnreadableFile: the digests themselves cannot be read.
    """
    folder = local_copy(folder)
    if not (folder / DIGESTS_FILE).is_file():
        return
    problems = []
    for name, expected in _read(folder / DIGESTS_FILE).items():
        if only is not None and name not in only:
            continue
        if name != pathlib.PurePath(name).name or not (folder / name).is_file():
            problems.append(f"{name} is missing")
        elif file_digest(folder / name, reread=reread) != expected:
            problems.append(f"{name} has other content")
    if problems:
        raise DamagedExport(
            f"{folder} is not what was exported: {', '.join(problems)} (see {DIGESTS_FILE}). Export or copy the folder "
            f"again; if the change was meant, remove {DIGESTS_FILE}."
        )


def _read(source: pathlib.Path) -> dict[str, str]:
    digests = read_json_object(source).get(_KEY)
    if not isinstance(digests, dict):
        raise DamagedExport(f"{source} has no {_KEY!r}: it is damaged. Export or copy the folder again.")
    return digests


def _write(folder: Path, digests: Mapping[str, str]) -> None:
    write_text(folder / DIGESTS_FILE, json.dumps({_KEY: digests}, indent=1) + "\n")
