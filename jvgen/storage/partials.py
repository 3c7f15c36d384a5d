"""Folders that are written under a hidden name beside their place, and what killed processes left of such."""

import os
import pathlib
import shutil
import socket


def partial_folder(folder: pathlib.Path) -> pathlib.Path:
    """The folder that this process writes beside a local one, to rename it at the end; it need not exist."""
    return folder.with_name(f"{_prefix(folder)}{os.getpid()}")


def remove_dead_partials(folder: pathlib.Path) -> list[pathlib.Path]:
    """Remove what processes of this host that have ended left beside a folder; returns what was removed.

    Those of other hosts, which may share the disk, stay: whether they live is not known here.
    """
    prefix, removed = _prefix(folder), []
    for place in folder.parent.iterdir() if folder.parent.is_dir() else ():
        process = place.name.removeprefix(prefix).split(".")[0]
        # One of this process' own number is of an earlier process that had it, as in containers.
        if (
            place.name.startswith(prefix)
            and process.isdigit()
            and (int(process) == os.getpid() or not _alive(int(process)))
        ):
            shutil.rmtree(place, ignore_errors=True)
            removed.append(place)
    return removed


def _prefix(folder: pathlib.Path) -> str:
    return f".{folder.name}.partial-{socket.gethostname()}-"


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
