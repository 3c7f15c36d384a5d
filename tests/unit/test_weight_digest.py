"""Digests of weight files: of their content, and read from a cache as long as the files are the same."""

import hashlib
import os
import time

import pytest

from jvgen import storage
from jvgen.interop import digest
from jvgen.interop.digest import content_digest

SIZE = digest.MIN_CACHED_BYTES


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of this test's own, and a count of the blocks that are hashed."""
    monkeypatch.setenv(storage.cache.FOLDER_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / digest.CACHE_FILE


@pytest.fixture
def hashed(monkeypatch):
    """One item per time that files were read and hashed."""
    count, original = [], digest._hash
    monkeypatch.setattr(digest, "_hash", lambda files: count.append(files) or original(files))
    return count


def write(path, content: bytes, age: float = 60.0) -> None:
    path.write_bytes(content)
    then = time.time() - age
    os.utime(path, (then, then))


def test_a_large_file_is_hashed_once(tmp_path, hashed):
    file = tmp_path / "weights.safetensors"
    write(file, bytes(SIZE))
    expected = hashlib.sha256(f"weights.safetensors {SIZE}\n".encode() + bytes(SIZE)).hexdigest()
    assert [content_digest(file), content_digest(file)] == [expected] * 2 and len(hashed) == 1
    write(tmp_path / "other.safetensors", b"1" * SIZE)
    assert content_digest(tmp_path / "other.safetensors") != expected and len(hashed) == 2
    assert content_digest(file) == expected and len(hashed) == 2, "entries of other files stay"


@pytest.mark.parametrize("change", ["content", "added", "time", "inode"])
def test_a_folder_that_changes_is_hashed_again(tmp_path, hashed, change):
    folder = tmp_path / "vae"
    folder.mkdir()
    write(folder / "model.safetensors", bytes(SIZE))
    write(folder / "config.json", b"{}")
    before = content_digest(folder)
    hashed.clear()
    if change == "content":
        write(folder / "config.json", b"[]", age=30)
    elif change == "added":
        write(folder / "more.json", b"{}")
    elif change == "time":
        write(folder / "config.json", b"{}", age=30)
    else:
        stat = (folder / "config.json").stat()
        (folder / "new").write_bytes(b"{}")
        os.utime(folder / "new", ns=(stat.st_atime_ns, stat.st_mtime_ns))
        (folder / "new").replace(folder / "config.json")
    same_content = change in ("time", "inode")
    assert (content_digest(folder) == before) == same_content and len(hashed) == 1


def test_pickles_are_content_where_they_are_the_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    alone = content_digest(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"1")
    pickled = content_digest(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"2")
    assert len({alone, pickled, content_digest(tmp_path)}) == 3
    (tmp_path / "model.safetensors").write_bytes(b"1")
    beside = content_digest(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    assert content_digest(tmp_path) == beside


def test_small_and_new_files_are_always_hashed(tmp_path, hashed, cache):
    write(tmp_path / "small", b"1")
    write(tmp_path / "new", bytes(SIZE), age=0)
    for name in ("small", "new"):
        assert content_digest(tmp_path / name) == content_digest(tmp_path / name)
    assert len(hashed) == 4 and not cache.exists()


def test_a_ruined_or_read_only_cache_does_no_harm(tmp_path, cache, hashed, monkeypatch):
    cache.parent.mkdir()
    cache.write_text('{"')
    write(tmp_path / "weights", bytes(SIZE))
    first = content_digest(tmp_path / "weights")
    assert content_digest(tmp_path / "weights") == first and len(hashed) == 1, "written anew"
    monkeypatch.setenv(storage.cache.FOLDER_VARIABLE, "/proc/nowhere")
    assert content_digest(tmp_path / "weights") == first
