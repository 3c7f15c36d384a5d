"""A decoder that never returns is given up, by name, in threads and in processes; other files are not lost."""

import re
import time

import numpy as np
import pytest

from jvgen.data.builders import workers
from jvgen.data.builders.build_loop import BuildError, BuildJob, Execution, build_dataset
from jvgen.data.builders.jobs import Corrupt
from jvgen.data.builders.workers import in_order
from jvgen.data.store.records import Record
from jvgen.data.video_files import encode_image

GIVEN_UP = "given up after {:g} s: reading it takes longer (raise --file-timeout), or hangs"


def slow(number: int) -> int:
    """Sleeps for ever for one payload, as decoders do that wait for a lock."""
    if number == 3:
        time.sleep(3600)
    return number


def stuck(number: int) -> int:
    """Holds Python's lock for ever, as libraries do that loop."""
    if number == 1:
        re.match(r"(a+)+$", "a" * 60 + "b")
    return number


def record(number: int) -> Record:
    clip = encode_image(np.full((8, 8, 3), slow(number), np.uint8))
    return Record(id=f"r{number}", kind="image", clips=(clip,), height=8, width=8)


@pytest.mark.parametrize("threads", [1, 3])
def test_in_threads(threads):
    began = time.monotonic()
    found = list(in_order(slow, range(12), threads, processes=False, limit=0.5))
    assert found[3] == Corrupt(GIVEN_UP.format(0.5))
    assert [item for item in found if not isinstance(item, Corrupt)] == [n for n in range(12) if n != 3]
    assert time.monotonic() - began < 30


@pytest.mark.slow
def test_in_processes():
    found = list(in_order(stuck, range(4), 2, processes=True, limit=2))
    assert found == [0, Corrupt(GIVEN_UP.format(2)), 2, 3]


@pytest.mark.parametrize("threads", [4, 16])
def test_threads_wait_while_results_hold_many_bytes(monkeypatch, threads):
    """Decoded clips ahead of an encoder that is slower, however many threads decode."""
    monkeypatch.setattr(workers, "_MOST_AHEAD", 200)
    begun = []

    def large(number: int) -> np.ndarray:
        begun.append(number)
        time.sleep(0.002)  # all threads could begin one
        if number == 0:
            raise ValueError("of no size")
        return np.full(100, number, np.uint8)

    results = in_order(large, range(40), threads, processes=False, limit=10, large=True)
    assert isinstance(next(results), Corrupt)
    for number in range(1, 40):
        assert next(results)[0] == number
        time.sleep(0.01)
        # And two that wait or are being made.
        assert len(begun) <= number + 1 + 2
    assert list(results) == [] and len(begun) == 40


def test_errors_pass_from_threads():
    def interrupted(number: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(in_order(interrupted, range(3), 1, processes=False, limit=10))


def test_a_build_names_and_counts_the_file(tmp_path):
    jobs = [BuildJob("train", f"clip {number}.mp4", number) for number in range(5)]

    def built(budget: float, limit: float):
        return build_dataset(
            tmp_path / "out", jobs, record, description="x", metadata={"origin": "test"}, error_budget=budget,
            execution=Execution(limit=limit),
        )  # fmt: skip

    summary = built(0.2, 0.5)
    assert [(item.name, item.reason) for item in summary.rejected] == [("clip 3.mp4", GIVEN_UP.format(0.5))]
    assert summary.records == 4
    with pytest.raises(ValueError, match="limit = 0: must be positive"):
        built(0.2, 0)
    (tmp_path / "out" / "dataset_info.json").unlink()
    with pytest.raises((BuildError, ValueError)):
        built(0.0, 0.5)
