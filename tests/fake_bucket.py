"""Buckets in memory, for quick tests: what `gs://` paths read and write, and how often a call fails."""

import collections
from collections.abc import Iterator

import fsspec
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem


class Throttled(OSError):
    """As servers say it."""

    code = 429


class MemoryBuckets(MemoryFileSystem):
    """Buckets of this process. Folders exist by the files in them, as in object stores."""

    protocol = ("gs", "gcs")
    store: dict = {}
    pseudo_dirs = [""]
    # Calls that are still to fail, by name of the method; every call is counted.
    failing: dict = {}
    calls: collections.Counter = collections.Counter()

    @classmethod
    def _strip_protocol(cls, path):
        text = str(path)
        for prefix in ("gs://", "gcs://"):
            text = text.removeprefix(prefix)
        return "/" + text.strip("/")

    def _call(self, name: str) -> None:
        self.calls[name] += 1
        if self.failing.get(name, 0) > 0:
            self.failing[name] -= 1
            raise Throttled("Too Many Requests")

    def cat_file(self, path, *arguments, **options):
        self._call("cat_file")
        return super().cat_file(path, *arguments, **options)

    def get_file(self, path, *arguments, **options):
        self._call("get_file")
        return super().get_file(path, *arguments, **options)

    def pipe_file(self, path, value, *arguments, **options):
        self._call("pipe_file")
        return super().pipe_file(path, value, *arguments, **options)


@pytest.fixture
def buckets(monkeypatch) -> Iterator[type[MemoryBuckets]]:
    """`gs://bucket` exists in memory and is empty."""
    MemoryBuckets.store, MemoryBuckets.pseudo_dirs = {}, ["", "/bucket"]
    MemoryBuckets.failing, MemoryBuckets.calls = {}, collections.Counter()
    fs = MemoryBuckets(skip_instance_cache=True)
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url, **options: (fs, fs._strip_protocol(url)))
    monkeypatch.setattr(backend._FileSystemSpecBackend, "fs", lambda self, path: fs)
    yield MemoryBuckets
