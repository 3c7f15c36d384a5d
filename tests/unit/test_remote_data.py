"""Data sets in buckets: written, found, read through the cache, and what happens when reads fail."""

import uuid

import numpy as np
import pytest

from jvgen import storage
from jvgen.config import ConfigError
from jvgen.data.builders.folders import build_videos
from jvgen.data.store.records import Record
from jvgen.data.store.show import show
from jvgen.data.store.sources import open_source
from jvgen.data.store.writer import Writer
from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.data.stream.loader import Loader
from jvgen.data.stream.quarantine import TooManyFailures
from jvgen.data.stream.source_checks import check_cache
from jvgen.data.video_files import encode_image
from jvgen.storage import retries
from tests.fake_bucket import buckets  # noqa: F401


def _write(out, count: int = 6, overwrite: bool = False) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
    with Writer(out, description="images", shard_bytes=1500, overwrite=overwrite) as writer:
        for number in range(count):
            image = Record(id=f"image-{number}", kind="image", clips=(encode_image(pixels),), height=16, width=16)
            writer.add("train", image)


@pytest.fixture
def remote(buckets, tmp_path, monkeypatch):  # noqa: F811
    """The remote of a data set of several shards, and an empty cache."""
    monkeypatch.setenv("JVGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(retries, "_sleep", lambda seconds: None)
    # Readers stay open for the whole process: each test has its own paths.
    url = f"gs://bucket/{uuid.uuid4().hex}/images"
    _write(url)
    return url


def _config(url: str, **options) -> DataConfig:
    bucket = BucketConfig(frames=1, height=16, width=16, batch_size=2)
    return DataConfig(sources=(SourceConfig(path=url),), buckets=(bucket,), threads=2, **options)


def test_a_data_set_in_a_bucket_is_that_on_disk(remote, tmp_path):
    _write(tmp_path / "images")
    local, source = open_source(tmp_path / "images", "train"), open_source(remote.removesuffix("/images"), "train")
    assert str(source.folder) == remote
    assert source.index.digest == local.index.digest
    for row in range(len(local)):
        assert source.read(row).clips == local.read(row).clips
    names = sorted(path.name for path in storage.as_path(remote).iterdir())
    assert names == sorted(path.name for path in (tmp_path / "images").iterdir())
    assert show(remote, count=2).text.splitlines()[0].startswith(remote)


def test_shards_are_copied_once(remote, buckets):  # noqa: F811
    shards = sum(".array_record" in path.name for path in storage.as_path(remote).iterdir())
    assert shards > 1
    source = open_source(remote, "train")
    for _ in range(2):
        for row in range(len(source)):
            source.read(row)
    assert buckets.calls["get_file"] == shards + 1, "the shards, and the columns of the index"


def test_a_data_set_is_replaced_only_if_told(remote):
    with pytest.raises(ValueError, match="already contains a data set"):
        _write(remote)
    _write(remote, count=3, overwrite=True)
    assert len(open_source(remote, "train")) == 3


def test_batches_come_from_the_bucket(remote, tmp_path):
    _write(tmp_path / "images")
    local = _config(remote).replace(sources=(SourceConfig(path=str(tmp_path / "images")),))
    with Loader(local, seed=0, preprocess=dict).batches(0, 2) as here:
        expected = [batch.record_ids for batch in here]
    with Loader(_config(remote), seed=0, preprocess=dict).batches(0, 2) as there:
        assert [batch.record_ids for batch in there] == expected


def test_failed_reads_end_the_run_or_are_quarantined(remote, buckets):  # noqa: F811
    config = _config(remote, error_budget=0.5)
    log = storage.as_path("gs://bucket/run/quarantine.jsonl")
    stopping = Loader(config, seed=0, preprocess=dict)
    going_on = Loader(config.replace(on_failed_read="quarantine"), seed=0, preprocess=dict, quarantine_log=log)
    buckets.failing["get_file"] = 10**9
    with stopping.batches(0, 2) as stream:
        with pytest.raises(storage.StorageUnavailable, match="cannot read .* after 5 attempts: Throttled"):
            next(stream)
    with going_on.batches(0, 2) as stream:
        with pytest.raises(TooManyFailures, match=f"cannot read {remote}/"):
            next(stream)
    assert not storage.is_empty(log)


def test_a_cache_that_is_too_small_is_found_before_the_run(remote):
    check_cache(_config(remote))
    with pytest.raises(ValueError, match="more than the cache of .*raise data.cache_gib or JVGEN_CACHE_GIB"):
        check_cache(_config(remote, cache_gib=1e-6))


def test_a_missing_data_set_names_the_path(remote):
    with pytest.raises(ValueError, match=f"data set folder '{remote[:-1]}' does not exist. Did you mean {remote}"):
        open_source(remote[:-1], "train")


def test_recordings_are_read_from_local_folders():
    with pytest.raises(ConfigError, match="gs://bucket/videos: recordings are read from local folders"):
        build_videos("gs://bucket/videos", "gs://bucket/data")
