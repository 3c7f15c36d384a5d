"""The folder of a new data set: whether it may be written, and moving a complete data set there."""

import os
import shutil
from pathlib import Path as LocalPath

from jvgen.data.store import dataset_info
from jvgen.storage import Path, absolute, is_remote, remove_tree, resolved, upload_folder


def out_folder(out: str | Path) -> Path:
    """The absolute path of a data set to be written; of a link, that of the folder to which it leads.

    What is built waits beside it, and becomes the data set in a rename: on the disk of that folder.

    Raises:
      ValueError: a mount point, which cannot be renamed.
    """
    path = absolute(out)
    if is_remote(path):
        return path
    path = resolved(path) if path.is_symlink() else path
    if os.path.ismount(path):
        raise ValueError(
            f"out = {str(path)!r} is a mount point, and data sets are built beside their folder, on its disk; use a "
            f"folder in it, {str(path / 'data')!r}."
        )
    return path


def check_out(out: Path, overwrite: bool) -> None:
    """Raise `ValueError` if a folder exists that is not empty, unless it is a data set that may be replaced."""
    if out.is_file():
        raise ValueError(f"out = {str(out)!r} is a file; use a folder that does not exist yet.")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / dataset_info.NAME).is_file():
        raise ValueError(f"out = {str(out)!r} contains something other than a data set; use another folder.")
    if not overwrite:
        raise ValueError(f"out = {str(out)!r} already contains a data set; pass --overwrite, or use another folder.")


def move_to_out(data: LocalPath, out: Path, overwrite: bool) -> None:
    """Make a complete local folder the data set at `out`: by a rename, or by an upload whose last file is the metadata.

    A data set that is replaced is beside it, as `.NAME.replaced`, until the new one is there.

    Raises:
      ValueError: as `check_out`.
    """
    check_out(out, overwrite)
    if is_remote(out):
        remove_tree(out)
        upload_folder(data, out, last=(dataset_info.NAME,))
        return
    replaced = out.parent / f".{out.name}.replaced"
    if out.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        out.rename(replaced)
    data.rename(out)
    # Also that of a process that was killed between the renames.
    shutil.rmtree(replaced, ignore_errors=True)
