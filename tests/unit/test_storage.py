"""Paths, files, retries, the cache and mirrors of `jvgen.storage`, against buckets in memory."""

import collections
import errno
import multiprocessing
import os
import pathlib
import threading
import time

import pytest

from jvgen import exit_codes, storage
from jvgen.config import ConfigError
from jvgen.storage import cache as caching
from jvgen.storage import errors, paths, retries
from jvgen.storage.retries import Retries
from tests.fake_bucket import buckets  # noqa: F401

NO_WAIT = Retries(attempts=3)


@pytest.fixture(autouse=True)
def waits(monkeypatch) -> list[float]:
    """Seconds that retries would have slept."""
    seconds: list[float] = []
    monkeypatch.setattr(retries, "_sleep", seconds.append)
    return seconds


@pytest.fixture
def cache(tmp_path) -> storage.FileCache:
    return storage.FileCache(tmp_path / "cache", limit=1000, retries=NO_WAIT)


def test_paths_are_local_or_remote():
    assert isinstance(storage.as_path("runs/x"), pathlib.Path)
    assert str(storage.as_path("~/x")) == os.path.expanduser("~/x")
    remote = storage.as_path("gs://bucket/runs/x")
    assert str(remote / "a.txt") == "gs://bucket/runs/x/a.txt"
    assert storage.is_remote(remote) and not storage.is_remote("runs/gs")
    assert storage.absolute(remote) == remote
    assert storage.absolute("runs").is_absolute()
    # pathlib removes a slash.
    assert str(storage.as_path(pathlib.Path("gs://bucket/x"))) == "gs://bucket/x"


def test_unknown_schemes_and_missing_packages_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match=r"ftp://host/x: unknown scheme ftp://; use gs:// and s3:// for buckets"):
        storage.as_path("ftp://host/x")
    with pytest.raises(ConfigError, match="names no bucket"):
        storage.as_path("gs://")
    monkeypatch.setitem(paths.SCHEMES, "s3", ("no_such_module", "s3"))
    with pytest.raises(ConfigError, match=r"s3:// needs the package no_such_module: pip install 'jvgen\[s3\]'"):
        storage.as_path("s3://bucket/x")


def test_files_are_read_and_written(buckets, tmp_path):  # noqa: F811
    for folder in (tmp_path / "deep" / "er", storage.as_path("gs://bucket/deep/er")):
        storage.write_text(folder / "a.txt", "one")
        storage.write_text(folder / "a.txt", "two")
        with storage.local_file(folder / "b.bin") as file:
            file.write_bytes(b"123")
        assert storage.read_text(folder / "a.txt") == "two"
        assert storage.size(folder / "b.bin") == 3
        assert sorted(path.name for path in folder.iterdir()) == ["a.txt", "b.bin"]
        assert not storage.is_empty(folder)
        storage.remove_tree(folder)
        assert storage.is_empty(folder)


def test_a_failed_write_leaves_nothing(buckets, tmp_path):  # noqa: F811
    for folder in (tmp_path / "x", storage.as_path("gs://bucket/x")):
        with pytest.raises(RuntimeError), storage.local_file(folder / "b.bin") as file:
            file.write_bytes(b"half")
            raise RuntimeError
        assert storage.is_empty(folder)


def test_throttled_reads_are_tried_again_and_counted(buckets, waits):  # noqa: F811
    path = storage.as_path("gs://bucket/a.txt")
    storage.write_text(path, "here")
    before = storage.count_of_retries()
    buckets.failing["cat_file"] = 3
    assert storage.read_text(path, Retries(attempts=4)) == "here"
    assert storage.count_of_retries() - before == 3
    assert 0.5 <= waits[0] <= 1 <= waits[1] <= 2 <= waits[2] <= 4
    buckets.failing["cat_file"] = 99
    with pytest.raises(storage.StorageUnavailable, match="cannot read gs://bucket/a.txt after 3 attempts") as failed:
        storage.read_text(path, NO_WAIT)
    assert exit_codes.of_error(failed.value) == exit_codes.restart_code()


def test_missing_files_buckets_and_credentials_are_told_apart(buckets):  # noqa: F811
    with pytest.raises(FileNotFoundError, match="gs://bucket/none.txt does not exist"):
        storage.read_text(storage.as_path("gs://bucket/none.txt"), NO_WAIT)
    with pytest.raises(storage.StorageError, match="the bucket gs://elsewhere does not exist") as failed:
        storage.read_text(storage.as_path("gs://elsewhere/none.txt"), NO_WAIT)
    assert exit_codes.of_error(failed.value) == exit_codes.USER_ERROR
    assert buckets.calls["cat_file"] == 2  # neither was tried again

    class DefaultCredentialsError(Exception):
        """As google.auth calls it."""

    class Forbidden(OSError):
        code = 403

    path = storage.as_path("gs://bucket/x")
    no_credentials = errors.explain(DefaultCredentialsError("none found"), path, "read")
    assert "no valid credentials" in str(no_credentials) and "gcloud auth" in str(no_credentials)
    assert "access denied" in str(errors.explain(Forbidden("no"), path, "write"))
    assert not errors.is_transient(DefaultCredentialsError()) and not errors.is_transient(Forbidden())


def test_a_bucket_that_cannot_be_written_is_a_config_error(buckets, monkeypatch):  # noqa: F811
    folder = storage.as_path("gs://bucket/run")
    storage.check_run_directory(folder)
    assert storage.is_empty(folder)

    def denied(*arguments, **options):
        raise PermissionError("no")

    monkeypatch.setattr(buckets, "pipe_file", denied)
    with pytest.raises(ConfigError, match="cannot write gs://bucket/run/.*access denied"):
        storage.check_run_directory(folder)
    with pytest.raises(ConfigError, match="Orbax writes checkpoints to gs:// and to local folders only"):
        storage.check_run_directory("s3://bucket/run")


def test_the_cache_keeps_the_files_used_last(buckets, cache):  # noqa: F811
    remote = storage.as_path("gs://bucket/data")
    for name in "abc":
        storage.write_bytes(remote / name, name.encode() * 400)
    a, b = cache.fetch(remote / "a"), cache.fetch(remote / "b")
    os.utime(b, ns=(1, 1))
    assert cache.fetch(remote / "a") == a
    c = cache.fetch(remote / "c")
    assert a.exists() and c.read_bytes() == b"c" * 400
    assert not b.exists()
    assert buckets.calls["get_file"] == 3
    with pytest.raises(ConfigError, match="more than the cache of"):
        storage.write_bytes(remote / "large", bytes(1001))
        cache.fetch(remote / "large")


def test_the_cache_makes_room_where_the_disk_is_full(buckets, cache, monkeypatch):  # noqa: F811
    for name in ("a", "b"):
        storage.write_bytes(storage.as_path(f"gs://bucket/{name}"), bytes(20))
    first = cache.fetch(storage.as_path("gs://bucket/a"))
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr("jvgen.storage.cache.shutil.disk_usage", lambda folder: usage(100, 95, 5))
    second = cache.fetch(storage.as_path("gs://bucket/b"))
    assert second.exists() and not first.exists(), "20 bytes are kept, 5 are free, 20 are needed"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_not_tried_again(code):
    calls = []

    def copy() -> None:
        calls.append(1)
        raise OSError(code, "full")

    with pytest.raises(OSError, match="full") as raised:
        Retries().call(copy, storage.as_path("gs://bucket/a"), "read")
    assert len(calls) == 1 and exit_codes.of_error(raised.value) == exit_codes.UNSAVED


def test_a_file_that_a_process_opens_is_not_evicted(buckets, cache):  # noqa: F811
    remote = storage.as_path("gs://bucket/data")
    for name in "abc":
        storage.write_bytes(remote / name, name.encode() * 400)
    with cache.opening(remote / "a") as a:
        os.utime(a, ns=(1, 1))
        b = cache.fetch(remote / "b")
        cache.fetch(remote / "c")
        assert a.exists() and not b.exists()


def test_a_changed_file_is_downloaded_again(buckets, cache):  # noqa: F811
    path = storage.as_path("gs://bucket/data/a")
    storage.write_bytes(path, b"old")
    assert cache.fetch(path).read_bytes() == b"old"
    storage.write_bytes(path, b"newer")
    assert cache.fetch(path).read_bytes() == b"newer"


def test_threads_download_a_file_once(buckets, cache, monkeypatch):  # noqa: F811
    path = storage.as_path("gs://bucket/data/a")
    storage.write_bytes(path, bytes(500))
    plain = buckets.get_file

    def slow(*arguments, **options):
        time.sleep(0.05)
        return plain(*arguments, **options)

    monkeypatch.setattr(buckets, "get_file", slow)
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(cache.fetch(path).read_bytes())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [bytes(500)] * 8
    assert buckets.calls["get_file"] == 1


def test_a_failed_or_killed_download_is_never_seen(buckets, cache):  # noqa: F811
    path = storage.as_path("gs://bucket/data/a")
    storage.write_bytes(path, bytes(500))
    buckets.failing["get_file"] = 99
    with pytest.raises(storage.StorageError):
        cache.fetch(path)
    files = cache.folder / "files"
    assert list(files.iterdir()) == []
    # What a killed process leaves neither counts nor stays.
    (files / ".0123-b.900.partial").write_bytes(bytes(10))
    buckets.failing.clear()
    assert cache.fetch(path).exists()
    assert not (files / ".0123-b.900.partial").exists()


def _hold(folder: str, seconds: float, ready) -> None:
    cache = storage.FileCache(pathlib.Path(folder), 1000)
    with cache._lock(cache.folder / "entry", caching.fcntl.LOCK_EX):
        ready.set()
        time.sleep(seconds)


def test_locks_hold_between_processes_and_end_with_them(cache):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold, args=(str(cache.folder), 600, ready))
    process.start()
    assert ready.wait(60)
    with (
        pytest.raises(BlockingIOError),
        cache._lock(cache.folder / "entry", caching.fcntl.LOCK_EX | caching.fcntl.LOCK_NB),
    ):
        pass
    process.kill()
    process.join()
    with cache._lock(cache.folder / "entry", caching.fcntl.LOCK_EX | caching.fcntl.LOCK_NB):
        pass


def test_folders_are_copied_for_libraries_that_need_files(buckets, cache, tmp_path):  # noqa: F811
    folder = storage.as_path("gs://bucket/weights/vae")
    storage.write_text(folder / "config.json", "{}")
    storage.write_bytes(folder / "deep" / "x.bin", bytes(9))
    copy = storage.local_copy(folder, cache)
    assert copy.name == "vae"
    assert (copy / "config.json").read_text() == "{}" and (copy / "deep" / "x.bin").read_bytes() == bytes(9)
    assert storage.local_copy(tmp_path, cache) == tmp_path
    assert not storage.local_copy("gs://bucket/nothing", cache).exists()


def test_the_cache_of_a_machine_replaces_that_of_a_config(monkeypatch, tmp_path):
    monkeypatch.delenv("JVGEN_CACHE", raising=False)
    monkeypatch.delenv("JVGEN_CACHE_GIB", raising=False)
    assert caching.cache_of("/data/cache", 2.0) == storage.FileCache(pathlib.Path("/data/cache"), 2 << 30)
    monkeypatch.setenv("JVGEN_CACHE", str(tmp_path))
    monkeypatch.setenv("JVGEN_CACHE_GIB", "0.5")
    assert caching.cache_of("/data/cache", 2.0) == storage.FileCache(tmp_path, 1 << 29)
    monkeypatch.setenv("JVGEN_CACHE_GIB", "much")
    with pytest.raises(ConfigError, match="JVGEN_CACHE_GIB = 'much'"):
        caching.cache_of(None, None)


def test_mirrors_upload_what_changed(buckets, tmp_path):  # noqa: F811
    path = storage.as_path("gs://bucket/run/metrics.jsonl")
    logged: list[str] = []
    mirror = storage.Mirror(path, interval=0.02, log=logged.append)
    mirror.local.write_text("1\n")
    deadline = time.monotonic() + 10
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert storage.read_text(path) == "1\n"
    with mirror.local.open("a") as file:
        file.write("2\n")
    mirror.close()
    assert storage.read_text(path) == "1\n2\n" and not mirror.local.exists()
    assert logged == []
    local = storage.Mirror(tmp_path / "metrics.jsonl")
    assert local.local == tmp_path / "metrics.jsonl"
    local.close()


def test_a_mirror_warns_and_keeps_its_files_when_the_bucket_cannot_be_written(buckets, monkeypatch):  # noqa: F811
    logged: list[str] = []
    mirror = storage.Mirror(storage.as_path("gs://bucket/run/tensorboard"), interval=600, log=logged.append)
    mirror.local.mkdir()
    (mirror.local / "events").write_text("x")

    def denied(*arguments, **options):
        raise PermissionError("no")

    monkeypatch.setattr(buckets, "pipe_file", denied)
    mirror.close()
    assert "cannot write gs://bucket/run/tensorboard/events" in logged[0]
    assert (mirror.local / "events").exists()
