"""Quarantine: complete lines, an enforced budget, and record names in the error."""

import dataclasses
import json
import pickle
import threading

import pytest

from jvgen.data.stream.quarantine import MIN_FAILURES, Failure, Quarantine, TooManyFailures, append_line, process_log


def failure(row: int, step: int = 0) -> Failure:
    return Failure(step=step, slot=1, source="clips [train]", row=row, id=f"clip-{row}", error="truncated")


def test_each_failure_is_a_line(tmp_path):
    log = tmp_path / "deep" / "quarantine.jsonl"
    quarantine = Quarantine(log, 0.5)
    quarantine.failed(failure(3, step=17))
    quarantine.failed(failure(4))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines[0] == {
        "step": 17, "slot": 1, "source": "clips [train]", "row": 3, "id": "clip-3", "error": "truncated",
        "data": "",
    }  # fmt: skip
    assert len(lines) == 2


def test_the_minimum_comes_before_the_share():
    quarantine = Quarantine(None, 0.001)
    for row in range(MIN_FAILURES):
        quarantine.failed(failure(row))
    with pytest.raises(TooManyFailures) as caught:
        quarantine.failed(failure(MIN_FAILURES))
    for row in range(MIN_FAILURES + 1):
        assert f"clip-{row} (clips [train], row {row}): truncated" in str(caught.value)
    assert "error_budget = 0.001" in str(caught.value)


def test_the_share_counts_what_was_read():
    quarantine = Quarantine(None, 0.1)
    for _ in range(192):
        quarantine.succeeded()
    for row in range(21):
        quarantine.failed(failure(row))
    # 22 of 214 are more than a tenth.
    with pytest.raises(TooManyFailures, match="22 records could not be decoded in 214 read"):
        quarantine.failed(failure(21))


def test_a_record_that_fails_every_epoch_counts_once():
    quarantine = Quarantine(None, 0.001)
    for epoch in range(50):
        quarantine.failed(failure(7, step=epoch))


def test_no_budget_allows_no_failure(tmp_path):
    log = tmp_path / "quarantine.jsonl"
    with pytest.raises(TooManyFailures, match="clip-7"):
        Quarantine(log, 0.0).failed(failure(7))
    assert json.loads(log.read_text())["row"] == 7


def test_long_lists_are_shortened():
    quarantine = Quarantine(None, 0.0)
    for row in range(30):
        with pytest.raises(TooManyFailures) as caught:
            quarantine.failed(failure(row))
    assert "and 20 before" in str(caught.value) and "clip-29" in str(caught.value)


def test_lines_of_concurrent_writers_are_complete(tmp_path):
    log = tmp_path / "log.jsonl"

    def write(writer: int) -> None:
        for number in range(50):
            append_line(log, {"writer": writer, "number": number, "text": "x" * 300})

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len({(line["writer"], line["number"]) for line in lines}) == 400


def test_a_copy_in_another_process_starts_at_zero_and_keeps_its_log(tmp_path):
    quarantine = Quarantine(tmp_path / "log.jsonl", 0.001)
    for row in range(MIN_FAILURES):
        quarantine.failed(failure(row))
    copy = pickle.loads(pickle.dumps(quarantine))
    copy.failed(failure(99))
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == MIN_FAILURES + 1


def test_errors_can_be_sent_between_processes():
    error = pickle.loads(pickle.dumps(TooManyFailures("names")))
    assert isinstance(error, TooManyFailures) and str(error) == "names"


def test_each_process_has_its_own_log(tmp_path):
    log = tmp_path / "quarantine.jsonl"
    assert process_log(log, 0, 1) == log
    assert process_log(log, 3, 8) == tmp_path / "quarantine-00003.jsonl"


def test_failures_are_remembered_over_restarts(tmp_path):
    """Those of all processes count, once, beside the samples that were read; lines of other data sets do not."""
    log = tmp_path / "quarantine.jsonl"
    old = failure(0)
    of_data = [dataclasses.replace(failure(row), data="abc") for row in range(1, 30)]
    for process in range(2):
        quarantine = Quarantine(process_log(log, process, 2), 0.1)
        quarantine.read_before(1000)
        for one in (old, *of_data[process::2][:8]):
            quarantine.failed(one)
    with process_log(log, 0, 2).open("a") as file:
        file.write('{"step": 17, "slo')
    (tmp_path / "quarantine_notes.jsonl").write_text("no log")
    again = Quarantine(log, 0.1)
    assert again.known == 16
    again.read_before(200)
    for one in of_data[:20]:  # 16 of them are known, 4 are new: 20 of 220
        again.failed(one)
    assert len(log.read_text().splitlines()) == 4
    copy = pickle.loads(pickle.dumps(again))
    assert copy.known == 16 and copy.budget == 0.1
    with pytest.raises(TooManyFailures, match="23 records could not be decoded in 223 read"):
        for one in of_data[22:]:
            again.failed(one)
    assert Quarantine(tmp_path / "other.jsonl", 0.1).known == 0
