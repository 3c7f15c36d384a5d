"""Paths: text to a local or remote path."""

import functools
import importlib.util
import os
import pathlib
import re

# Only if it is not set: with TensorFlow installed, epath would use its file systems, which have no s3://.
os.environ.setdefault("EPATH_USE_TF", "false")

from etils import epath  # noqa: E402

from jvgen.config import ConfigError  # noqa: E402

Path = pathlib.Path | epath.Path

# Scheme: (module of fsspec's file system, jvgen's extra that installs it).
SCHEMES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
# One slash is enough: pathlib.Path("gs://bucket") is "gs:/bucket".
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/+(.*)", re.DOTALL)


def as_path(path: str | os.PathLike[str]) -> Path:
    """A path from text: `gs://bucket/...` and `s3://bucket/...` are remote, everything else is local.

    `~` is expanded. A `pathlib.Path` made of a URL, which loses a slash, is understood too.

    Raises:
      ConfigError: an unknown scheme, no bucket, or a missing extra (`jvgen[gcs]`, `jvgen[s3]`).
    """
    text = os.fspath(path)
    match = _URL.fullmatch(text)
    if match is None:
        return pathlib.Path(text).expanduser()
    scheme, rest = match.groups()
    if scheme not in SCHEMES:
        if "://" not in text:
            return pathlib.Path(text)
        known = " and ".join(f"{name}://" for name in SCHEMES)
        raise ConfigError(f"{text}: unknown scheme {scheme}://; use {known} for buckets, or a path without scheme.")
    if not rest.split("/")[0]:
        raise ConfigError(f"{text}: names no bucket; write {scheme}://BUCKET/FOLDER.")
    _prepare(scheme, text)
    return epath.Path(f"{scheme}://{rest}")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is in a bucket."""
    match = _URL.fullmatch(os.fspath(path))
    return match is not None and match.group(1) in SCHEMES


def absolute(path: str | os.PathLike[str]) -> Path:
    """The path from the root of its file system: independent of the working directory."""
    path = as_path(path)
    return path if is_remote(path) else path.absolute()


def resolved(path: str | os.PathLike[str]) -> Path:
    """The absolute path without symbolic links."""
    path = as_path(path)
    return path if is_remote(path) else path.resolve()


def recordings(path: str | os.PathLike[str]) -> pathlib.Path:
    """A path of recordings from which a data set is built.

    Raises:
      ConfigError: it is in a bucket.
    """
    if is_remote(path):
        raise ConfigError(f"{path}: recordings are read from local folders; mount the bucket, or copy them first.")
    return pathlib.Path(path).expanduser()


def _prepare(scheme: str, text: str) -> None:
    module, extra = SCHEMES[scheme]
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"{text}: {scheme}:// needs the package {module}: pip install 'jvgen[{extra}]'.")
    _configure()


@functools.cache
def _configure() -> None:
    """Turn off fsspec's cache of listings: other processes and TensorStore write what it would not see."""
    import fsspec

    for name in ("gs", "gcs", "s3"):
        fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)
