"""What a run says of itself: times of its start, goodput over restarts, XProf traces, a log file per process."""

import json
import logging
import os
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import toys  # noqa: E402

from jvgen import config  # noqa: E402
from jvgen.config import ConfigError  # noqa: E402
from jvgen.parallel.mesh import make_mesh  # noqa: E402
from jvgen.storage import as_path, read_text  # noqa: E402
from jvgen.training import session  # noqa: E402
from jvgen.training.config import TrainingConfig  # noqa: E402
from jvgen.training.loop import train  # noqa: E402
from jvgen.training.telemetry import goodput, throughput  # noqa: E402
from jvgen.training.telemetry.goodput import Goodput, goodput_line  # noqa: E402
from jvgen.training.telemetry.hooks import Hook  # noqa: E402
from jvgen.training.telemetry.json_lines import read_rows  # noqa: E402
from jvgen.training.telemetry.process_log import ProcessLog  # noqa: E402
from jvgen.training.telemetry.startup import StartClock  # noqa: E402
from jvgen.training.telemetry.weights_and_biases import WeightsAndBiases  # noqa: E402
from tests import quick_xla
from tests.fake_bucket import buckets  # noqa: E402, F401


class Reports(Hook):
    def __init__(self):
        self.reports = []

    def on_report(self, name, step, values):
        self.reports.append((name, step, dict(values)))


@pytest.fixture(scope="module")
def run_twice(tmp_path_factory, quick_compilations):
    """A run of two starts: its folder, and the reports to a hook."""
    folder, hook = tmp_path_factory.mktemp("run"), Reports()
    experiment = toys.experiment(
        **{
            "training.tensorboard": "true", "training.evaluate_every": 2, "training.evaluation_batches": 1,
            "checkpoint.every": 2,
        }
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        for stop in (3, 5):
            assert train(experiment, folder, hooks=[hook], stop_after=stop, make_loader=toys.FakeLoader) == 0
    return folder, hook.reports


def test_each_start_reports_its_times_by_part(run_twice):
    _, reports = run_twice
    starts = [(step, values) for name, step, values in reports if name == "start"]
    assert [step for step, _ in starts] == [1, 4], "after the first step of each start"
    for _, values in starts:
        parts = {name: seconds for name, seconds in values.items() if name != "total"}
        assert {"devices", "data", "digests", "compile", "first batch", "first step"} <= parts.keys()
        assert values["total"] == pytest.approx(sum(parts.values())) and values["compile"] > 0
    assert "init" in starts[0][1] and "restore" in starts[1][1]


def test_goodput_covers_all_starts_and_sums_to_their_time(run_twice):
    folder, reports = run_twice
    last = [values for name, _, values in reports if name == "goodput"][-1]
    assert last["starts"] == 2 and 0 < last["fraction"] < 1
    assert last["evaluation_seconds"] > 0 and last["save_seconds"] > 0 and last["compile_seconds"] > 0
    starts = json.loads((folder / "goodput.json").read_text())["starts"]
    wall = starts[-1]["ended"] - starts[0]["began"]
    assert last["total_seconds"] == pytest.approx(wall, rel=0.02)
    rows = read_rows(folder / "reports.jsonl")
    assert [row["report"] for row in rows if row["report"] == "start"] == ["start"] * 2
    assert rows[-1]["report"] == "goodput" and rows[-1]["fraction"] == last["fraction"]


def test_steps_are_traced_for_xprof(tmp_path):
    """In a process of its own: the profiler crashes where the TPU compiler has been loaded without a TPU."""
    settings = ("training.steps=3", "training.profile_steps=1,3", "data.buckets.1.batch_size=16")
    command = [sys.executable, toys.__file__, tmp_path / "run", *(w for s in settings for w in ("--set", s))]
    done = subprocess.run(command, env=os.environ | {"XLA_FLAGS": quick_xla.flags()}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (trace,) = (tmp_path / "run" / "profile").glob("plugins/profile/*/*.xplane.pb")
    content = trace.read_bytes()
    assert b"step_num" in content and b"train" in content
    assert "traced steps 1 to 2" in (tmp_path / "run" / "logs" / "process_0.log").read_text()


def test_the_log_file_of_a_process_has_every_message_of_both_starts_with_its_time(run_twice):
    folder, _ = run_twice
    text = (folder / "logs" / "process_0.log").read_text()
    for part in ("starting from step 0", "restored step 3", "s/step", "MiB / device", "goodput"):
        assert part in text, part
    assert text.count("s after the start") == 2
    stamped = [line for line in text.splitlines() if "restored step 3" in line]
    assert time.strptime(stamped[0][:19], "%Y-%m-%d %H:%M:%S")


def test_tensorboard_has_the_reports(run_twice):
    folder, _ = run_twice
    content = b"".join(path.read_bytes() for path in (folder / "tensorboard").iterdir())
    assert b"goodput/fraction" in content and b"start/compile" in content


def test_goodput_counts_repeated_steps_and_the_time_between_starts(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(goodput.time, "time", lambda: now[0])
    first = Goodput(tmp_path, 0, age=10, spent={"start": 4.0, "compile": 6.0})
    now[0] += 100
    first.add(goodput.DATA_WAIT, 20)
    first.update(step=40, write=True)
    # 80 s for 40 steps, of which the last 10 were not saved; 50 s until the next start begins.
    now[0] += 50
    second = Goodput(tmp_path, 30, age=0)
    now[0] += 10
    second.update(step=35)
    summary = second.summary()
    assert summary["lost_seconds"] == pytest.approx(20) and summary["down_seconds"] == pytest.approx(50)
    assert summary["step_seconds"] == pytest.approx(60 + 10) and summary["data_wait_seconds"] == 20
    assert summary["total_seconds"] == pytest.approx(now[0] - 990) and summary["starts"] == 2
    assert goodput_line(summary) == (
        "goodput 41.2% of 3 min in 2 starts: step 41.2%, start 2.4%, compile 3.5%, data wait 11.8%, lost 11.8%, "
        "down 29.4%"
    )


def test_goodput_survives_a_ruined_file_and_keeps_none_on_other_processes(tmp_path):
    (tmp_path / goodput.FILE).write_text('{"starts": [{')
    assert Goodput(tmp_path, 0).summary()["starts"] == 1
    other = Goodput(None, 0)
    assert other.update(1, write=True) and list(tmp_path.iterdir()) == [tmp_path / goodput.FILE]


def test_warnings_of_libraries_go_to_the_log_file_and_where_they_went_before(tmp_path, capsys):
    shown = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *rest: shown.append(str(message))
        with pytest.raises(RuntimeError), ProcessLog(tmp_path, 3) as log:
            log.write("two\nlines")
            warnings.warn("from Python", UserWarning, stacklevel=1)
            logging.getLogger("library").warning("of %s", "a logger")
            logging.getLogger("library").info("not this")
            raise RuntimeError("the end")
        warnings.warn("afterwards", UserWarning, stacklevel=1)
    lines = [line[24:] for line in (tmp_path / "logs" / "process_3.log").read_text().splitlines()]
    assert lines[1:3] == ["two", "lines"] and lines[3].endswith("UserWarning: from Python")
    assert lines[4:] == ["WARNING library: of a logger", "ends with RuntimeError: the end"]
    assert shown == ["from Python", "afterwards"]


def test_a_log_file_in_a_bucket_keeps_what_earlier_starts_said(buckets):  # noqa: F811
    workdir = as_path("gs://bucket/run")
    for start in ("first", "second"):
        with ProcessLog(workdir, 0) as log:
            log.write(f"the {start} start")
    written = read_text(workdir / "logs" / "process_0.log")
    assert written.index("the first start") < written.index("the second start")


def test_a_log_file_on_a_full_disk_ends_no_run(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "process_0.log").symlink_to("/dev/full")
    with ProcessLog(tmp_path, 0) as log:
        log.write("checkpoint of step 5 could not be written")


def test_a_clock_of_the_process_counts_from_its_start():
    clock = StartClock.of_process()
    assert clock.age > 0.5, "this process has imported JAX"
    clock.mark("imports")
    assert clock.report() == {"imports": pytest.approx(clock.age, abs=0.1), "total": clock.seconds["imports"]}


def test_peak_memory_is_that_of_the_fullest_device(monkeypatch):
    assert throughput.device_memory_peak_mib() == {}, "CPUs do not count"
    devices = [types.SimpleNamespace(memory_stats=lambda n=n: {"peak_bytes_in_use": n * 2**20}) for n in (3, 7)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert throughput.device_memory_peak_mib() == {"device_memory_peak_mib": 7}


@pytest.mark.parametrize("steps", ["3", "3,3", "-1,2"])
def test_impossible_steps_to_trace_are_refused(steps):
    with pytest.raises(ConfigError, match="profile_steps"):
        config.validate_tree(config.override(TrainingConfig(steps=5), [f"profile_steps={steps}"]))


def test_weights_and_biases_gets_the_reports():
    hook, rows = WeightsAndBiases.__new__(WeightsAndBiases), []
    hook._run = types.SimpleNamespace(log=rows.append)
    hook.on_report("goodput", 7, {"fraction": 0.9})
    assert rows == [{"step": 7, "goodput/fraction": 0.9}]
