"""Finds the files in folders of recordings, and matches the names in tables with them."""

import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path


def files_in(folder: Path) -> Iterator[Path]:
    """Files of a folder at any depth, sorted by path; links are followed, hidden files and folders left out.

    Links that lead nowhere are listed: reading them is an error that names them.

    Raises:
      ValueError: a folder that cannot be listed, whose files would be missing.
    """
    found = []
    above: dict[str, tuple[str, ...]] = {os.fspath(folder): ()}  # the places that links on the way to a folder left
    for parent, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        left, kept = above.pop(parent), []
        for name in folders:
            path = os.path.join(parent, name)
            is_link = os.path.islink(path)
            places = (*left, os.path.realpath(parent)) if is_link else left
            # A link to a folder above, or to one that a link on the way led out of, would go round for ever.
            if not _hidden(name) and not (is_link and _is_above(os.path.realpath(path), places)):
                above[path] = places
                kept.append(name)
        folders[:] = kept
        found += [Path(parent, name) for name in names if not _hidden(name)]
    return iter(sorted(found))


def _refuse(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise ValueError(
            f"folder {error.filename!r} cannot be listed ({error.strerror}), so its files would be left out: make it "
            "readable, or give a folder without it."
        ) from error


def _is_above(folder: str, places: Iterable[str]) -> bool:
    return any(f"{place}/".startswith(f"{folder}/") for place in places)


def name_of(path: Path, folder: Path) -> str:
    """The path relative to a folder, with slashes; bytes that are not UTF-8 as in `caf\\xe9.mp4`."""
    return readable(path.relative_to(folder).as_posix())


def readable(name: str) -> str:
    """A name as UTF-8 can have it: bytes that are none as in `caf\\xe9.mp4`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class Ambiguous(ValueError):
    """A name fits several files; the message has some of them."""


class Names:
    """Finds files by the names that people write: path, path without extension, bare name, bare name without extension.

    A looser form is tried where no file has the stricter one, and must fit one file alone. Composed and decomposed
    letters are the same.

    Args:
      names: of the files, relative to their folder, with slashes.
    """

    def __init__(self, names: Sequence[str]):
        self._forms: list[dict[str, list[str]]] = [{}, {}, {}, {}]
        for name in names:
            for form, key in zip(self._forms, _forms(name), strict=True):
                form.setdefault(key, []).append(name)

    def find(self, written: str) -> str | None:
        """The name of the file, or None.

        Raises:
          Ambiguous: several files have it.
        """
        key = _key(written)
        for form in self._forms:
            found = form.get(key, [])
            if len(found) > 1:
                raise Ambiguous(f"{written!r} fits {len(found)} files: {', '.join(found[:3])}; write the whole path")
            if found:
                return found[0]
        return None


def _forms(name: str) -> tuple[str, str, str, str]:
    key = _key(name)
    folder, slash, bare = key.rpartition("/")
    stem = bare.rsplit(".", 1)[0] if "." in bare[1:] else bare
    return key, f"{folder}{slash}{stem}", bare, stem


def _key(name: str) -> str:
    parts = unicodedata.normalize("NFC", name).replace("\\", "/").split("/")
    return "/".join(part for part in parts if part not in ("", "."))


def _hidden(name: str) -> bool:
    # Every ext4 disk has the second, which only root may list.
    return name.startswith(".") or name == "lost+found"


def suffixed(files: Iterable[Path], suffixes: Sequence[str]) -> list[Path]:
    """The files whose name ends in one of the suffixes, in any case."""
    return [path for path in files if path.suffix.lower() in suffixes]
