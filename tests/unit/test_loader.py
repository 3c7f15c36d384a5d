"""The loader on real data: the same batches for any processes, threads, workers and start step; failures; shutdown."""

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from jvgen.data.store.records import Record
from jvgen.data.store.writer import Writer
from jvgen.data.stream.config import BucketConfig, CaptionConfig, DataConfig, SourceConfig
from jvgen.data.stream.loader import Loader
from jvgen.data.stream.quarantine import TooManyFailures
from jvgen.data.video_files import encode_image, encode_video


def clip(number: int, frames: int = 12) -> bytes:
    noise = np.random.default_rng(number).integers(0, 255, (8, 8, 3))
    base = np.kron(noise, np.ones((4, 4, 1)))
    return encode_video(np.stack([np.roll(base, i, 1) for i in range(frames)]).astype(np.uint8), 8.0)


def record(number: int, clips: tuple[bytes, ...] | None = None) -> Record:
    return Record(
        id=f"clip-{number:02d}", kind="dynamic", clips=clips or (clip(number),), captions=(f"clip {number}", "moving"),
        frames_per_second=8.0, frames=12, height=32, width=32,
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    with Writer(folder / "clips", description="clips") as writer:
        for number in range(12):
            writer.add("train", record(number))
        for number in range(20, 25):
            writer.add("validation", record(number))
    with Writer(folder / "images", description="images") as writer:
        for number in range(8):
            pixels = np.random.default_rng(number).integers(0, 255, (40, 48, 3), np.uint8)
            writer.add(
                "train", Record(id=f"image-{number}", kind="image", clips=(encode_image(pixels),), height=40, width=48)
            )
    with Writer(folder / "broken", description="some clips that cannot be decoded") as writer:
        for number in range(12):
            whole = clip(number)
            writer.add("train", record(number, (whole if number % 3 else whole[: len(whole) // 3],)))
    with Writer(folder / "ruined", description="only clips that cannot be decoded") as writer:
        for number in range(4):
            writer.add("train", record(number, (b"not a clip",)))
    return folder


def config(data: Path, name: str = "clips", **changes) -> DataConfig:
    fields = {
        "sources": (SourceConfig(path=str(data / name), weight=2.0), SourceConfig(path=str(data / "images"))),
        "buckets": (
            BucketConfig(frames=5, height=24, width=32, batch_size=4, strides=(1, 2), kinds=("dynamic",), weight=2.0),
            BucketConfig(frames=1, height=32, width=32, batch_size=8),
        ),
        "evaluation_sources": (SourceConfig(path=str(data / "clips"), split="validation"),),
        "threads": 2,
        "prefetch": 2,
        "flip": True,
        **changes,
    }
    return DataConfig(**fields)


def preprocess(example: dict) -> dict[str, np.ndarray]:
    return {
        "video": example["video"],
        "caption": np.frombuffer(example["caption"].encode().ljust(16)[:16], np.uint8),
        "rate": example["frames_per_second"],
    }


def loader(settings: DataConfig, **changes) -> Loader:
    return Loader(settings, **{"seed": 5, "preprocess": preprocess, **changes})


def digests(stream: Loader, start: int, stop: int) -> list[str]:
    """One digest per batch, over every byte."""
    found = []
    with stream.batches(start, stop) as batches:
        for batch in batches:
            state = hashlib.sha256(f"{batch.step} {batch.bucket.name} {batch.record_ids}".encode())
            for name, array in sorted(batch.arrays.items()):
                state.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
            found.append(state.hexdigest())
    return found


def collect(stream: Loader, start: int, stop: int) -> list:
    with stream.batches(start, stop) as batches:
        return list(batches)


def test_batches_have_the_shape_of_their_bucket(data):
    stream = loader(config(data))
    batches = collect(stream, 0, 6)
    assert [batch.step for batch in batches] == list(range(6))
    assert sum(batch.bucket.frames == 5 for batch in batches) == 4
    for batch in batches:
        size = batch.bucket
        assert batch.bucket == stream.bucket(batch.step)
        assert batch.arrays["video"].shape == (size.batch_size, size.frames, size.height, size.width, 3)
        assert batch.arrays["video"].dtype == np.uint8 and batch.arrays["rate"].dtype == np.float32
        assert len(batch.record_ids) == size.batch_size and batch.read_seconds >= 0 and batch.substitutes == 0
        assert all(type(array) is np.ndarray for array in batch.arrays.values())


def test_any_number_of_threads_gives_the_same_bytes(data):
    expected = digests(loader(config(data, threads=1, prefetch=1)), 0, 8)
    assert digests(loader(config(data, threads=5, prefetch=6)), 0, 8) == expected


def test_a_later_start_continues_the_same_stream(data):
    stream = loader(config(data))
    assert digests(stream, 5, 9) == digests(stream, 0, 9)[5:]
    far = 10**12
    assert digests(stream, far + 1, far + 3) == digests(loader(config(data)), far, far + 3)[1:]


@pytest.mark.parametrize("name", ["clips", "broken"])
def test_processes_that_read_some_rows_read_those_of_the_whole_batch(data, name):
    """Rows with gaps, and rows that two processes share; a substitute is the same wherever it is read."""
    settings = config(data, name, error_budget=0.9)
    stream = loader(settings)
    whole = collect(stream, 0, 6)
    for offsets in ([0, 1], [1, 2, 3], [0, 3]):
        rows = lambda bucket, offsets=offsets: bucket.batch_size // 4 * np.array(offsets)  # noqa: E731
        for batch, part in zip(whole, collect(loader(settings, rows=rows), 0, 6), strict=True):
            slots = rows(batch.bucket)
            assert part.bucket == batch.bucket and part.slots.tolist() == slots.tolist()
            for key, array in batch.arrays.items():
                assert np.array_equal(part.arrays[key], array[slots])
            assert part.record_ids == tuple(batch.record_ids[slot] for slot in slots)
    assert (sum(batch.substitutes for batch in whole) > 0) == (name == "broken")
    differ = sum(
        planned != read
        for batch in whole
        for planned, read in zip(stream.record_ids(batch.step), batch.record_ids, strict=True)
    )
    assert differ == sum(batch.substitutes for batch in whole)


def test_workers_give_the_same_bytes_and_leave_nothing_behind(data):
    before = set(Path("/dev/shm").glob("psm_*"))
    settings = config(data, "broken", error_budget=0.9)
    expected = digests(loader(settings), 0, 7)
    assert digests(loader(dataclasses.replace(settings, workers=2)), 0, 7) == expected
    # Grain unlinks in a thread of its own.
    deadline = time.monotonic() + 5
    while set(Path("/dev/shm").glob("psm_*")) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(Path("/dev/shm").glob("psm_*")) <= before


@pytest.mark.parametrize("workers", [0, 1])
def test_a_program_that_exits_without_closing_leaks_nothing_and_prints_nothing(data, tmp_path, workers):
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(f"""
        import numpy as np
        from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
        from jvgen.data.stream.loader import Loader

        def preprocess(example):
            return {{"video": np.repeat(example["video"], 8, axis=1)}}

        if __name__ == "__main__":
            bucket = BucketConfig(frames=5, height=32, width=32, batch_size=4)
            source = SourceConfig(path={str(data / "clips")!r})
            config = DataConfig(sources=(source,), buckets=(bucket,), workers={workers}, prefetch=4)
            batches = Loader(config, seed=0, preprocess=preprocess).batches(0)
            batch = next(batches)
            batch = next(batches)
            print(batch.arrays["video"].shape)
        """)
    )
    before = set(Path("/dev/shm").glob("psm_*"))
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "(4, 5, 256, 32, 3)\n")
    assert done.stderr == ""
    assert set(Path("/dev/shm").glob("psm_*")) <= before


def test_closing_stops_threads_and_ends_the_iterator(data):
    def reading() -> int:
        return sum(thread.name.startswith(("jvgen-read", "grain-prefetch")) for thread in threading.enumerate())

    before = reading()
    batches = loader(config(data)).batches(0)
    next(batches)
    assert reading() > before
    batches.close()
    batches.close()
    with pytest.raises(StopIteration):
        next(batches)
    deadline = time.monotonic() + 5
    while reading() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert reading() == before


def test_two_iterators_of_one_loader_are_independent(data):
    stream = loader(config(data))
    first, second = stream.batches(0, 4), stream.batches(0, 4)
    one = next(first)
    other = next(second)
    first.close()
    assert np.array_equal(one.arrays["video"], other.arrays["video"])
    assert [batch.step for batch in second] == [1, 2, 3]
    second.close()


def test_a_record_that_cannot_be_decoded_is_replaced_and_the_rest_stays(data, tmp_path):
    log = tmp_path / "quarantine.jsonl"
    whole = collect(loader(config(data)), 0, 6)
    patched = collect(loader(config(data, "broken", error_budget=0.9), quarantine_log=log), 0, 6)
    bad = {f"clip-{number:02d}" for number in range(0, 12, 3)}
    replaced = 0
    for batch, other in zip(whole, patched, strict=True):
        for slot, (before, after) in enumerate(zip(batch.record_ids, other.record_ids, strict=True)):
            if before in bad:
                replaced += 1
                assert after not in bad and after.startswith("clip")
            else:
                assert after == before
                assert np.array_equal(batch.arrays["video"][slot], other.arrays["video"][slot])
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert replaced == sum(batch.substitutes for batch in patched) > 3
    # A substitute may be corrupt too: each attempt is one line.
    assert len(lines) >= replaced and {line["id"] for line in lines} <= bad
    for line in lines:
        assert line["source"].endswith("broken [train]") and line["error"] and line["row"] == int(line["id"][-2:])


def test_a_flipped_byte_on_disk_is_one_lost_record(data, tmp_path):
    corrupt = tmp_path / "clips"
    shutil.copytree(data / "clips", corrupt)
    file = next(corrupt.glob("*train.array_record*"))
    content = bytearray(file.read_bytes())
    # Inside the compressed pixels of one of the records.
    place = content.find(clip(4)[2000:2032])
    assert place > 0
    content[place] ^= 1
    file.write_bytes(content)
    log = tmp_path / "quarantine.jsonl"
    batches = collect(loader(config(tmp_path, sources=(SourceConfig(path=str(corrupt)),)), quarantine_log=log), 0, 9)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {line["id"] for line in lines} == {"clip-04"} and "is corrupt: " in lines[0]["error"]
    assert "clip-04" not in {name for batch in batches for name in batch.record_ids}


def test_a_restart_finds_the_same_substitutes(data):
    settings = config(data, "broken", error_budget=0.9)
    assert digests(loader(settings), 3, 6) == digests(loader(settings), 0, 6)[3:]


@pytest.mark.parametrize("workers", [0, 1])
def test_no_budget_stops_at_the_first_failure(data, tmp_path, workers):
    log = tmp_path / "quarantine.jsonl"
    stream = loader(config(data, "broken", error_budget=0.0, workers=workers), quarantine_log=log)
    with pytest.raises(TooManyFailures, match=r"clip-0\d \(.*broken \[train\], row \d\)"):
        collect(stream, 0, 12)
    assert log.read_text().endswith("}\n")


def test_a_pool_without_a_decodable_record_stops_the_run(data):
    settings = config(data, "ruined", error_budget=0.9)
    settings = dataclasses.replace(settings, sources=settings.sources[:1], buckets=settings.buckets[:1])
    with pytest.raises(TooManyFailures, match="no record of the kind and source of clip-.*ruined.*can be decoded"):
        collect(loader(settings), 0, 1)


def test_evaluation_gives_the_same_batches_each_time(data):
    streams = [loader(config(data), evaluation=True, seed=seed) for seed in (0, 1)]
    assert digests(streams[0], 0, 2) == digests(streams[1], 0, 2) == digests(streams[0], 0, 2)
    ids = {name for batch in collect(streams[0], 0, 6) for name in batch.record_ids}
    assert ids == {f"clip-{number}" for number in range(20, 25)}


def test_the_state_is_the_step_and_two_digests(data):
    stream = loader(config(data))
    state = stream.state(41)
    assert state == {"step": 41, "manifest": stream.plan.manifest, "plan": stream.plan.digest}
    loader(config(data, threads=4, workers=0, prefetch=3)).check_state(json.loads(json.dumps(state)))
    with pytest.raises(ValueError, match=r"broken \[train\].*hold other records"):
        loader(config(data, "broken")).check_state(state)
    with pytest.raises(ValueError, match="same step has another batch"):
        loader(config(data, flip=False)).check_state(state)
    with pytest.raises(ValueError, match="same step has another batch"):
        loader(config(data), seed=6).check_state(state)
    # What the plan has and the message must therefore name.
    for name, value in (("captions", CaptionConfig(first_sentence=0.5)), ("upscale", True)):
        with pytest.raises(ValueError, match=rf"{name}.*or pass --allow-changes"):
            loader(config(data, **{name: value})).check_state(state)


def test_a_missing_data_set_is_refused(data):
    with pytest.raises(ValueError, match="does not exist"):
        loader(config(data, "clisp"))


def test_arrays_that_do_not_stack_name_their_records(data):
    def ragged(example):
        return {"text": np.zeros(len(example["caption"]), np.uint8)}

    with pytest.raises(
        ValueError, match=r"records '\S+' and '\S+' were preprocessed.*text: uint8\[\d+\] and"
    ) as caught:
        collect(loader(config(data), preprocess=ragged), 0, 6)
    assert "grain" not in str(caught.value).lower()


def test_waiting_time_is_measured(data):
    def slow(example):
        time.sleep(0.05)
        return preprocess(example)

    def patient(settings):
        waits = []
        with loader(settings, preprocess=slow).batches(0, 4) as batches:
            for batch in batches:
                waits.append(batch.read_seconds)
                time.sleep(0.6)
        return waits

    waits = patient(config(data, threads=8))
    assert waits[0] > 0.05
    assert max(waits[1:]) < 0.3
