"""The training loop: files, order of events, resuming, stopping, refused checkpoints."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import toys  # noqa: E402

from jvgen import nested
from jvgen.config import ConfigError  # noqa: E402
from jvgen.data.stream.quarantine import TooManyFailures  # noqa: E402
from jvgen.exit_codes import DIVERGED, DONE, UNSAVED  # noqa: E402
from jvgen.parallel.mesh import make_mesh  # noqa: E402
from jvgen.training import session  # noqa: E402
from jvgen.training.checkpoint.initial import write_first_checkpoint  # noqa: E402
from jvgen.training.checkpoint.manager import Checkpoints  # noqa: E402
from jvgen.training.checkpoint.reader import CheckpointError, CheckpointReader  # noqa: E402
from jvgen.training.checkpoint.restore import load_for_inference  # noqa: E402
from jvgen.training.config import CheckpointConfig, TrainingConfig  # noqa: E402
from jvgen.training.loop import train  # noqa: E402
from jvgen.training.telemetry.json_lines import read_rows  # noqa: E402
from jvgen.training.watchdog import Watchdog  # noqa: E402

# Most tests compile the same programs again.
pytestmark = pytest.mark.usefixtures("shared_compilations")


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Runs see one device unless a test says otherwise."""
    devices = {"count": 1}
    monkeypatch.setattr(session, "make_mesh", lambda config: make_mesh(config, jax.devices()[: devices["count"]]))
    return devices


def run(folder, experiment=None, **options):
    options = {"make_loader": toys.FakeLoader} | options
    return train(experiment or toys.experiment(), folder, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run of 20 steps with evaluation, on one device."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    changes = {"training.evaluate_every": 5, "training.visualize_every": 10, "training.evaluation_batches": 2}
    patch = pytest.MonkeyPatch()
    patch.setattr(session, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    assert run(folder, toys.experiment(**changes)) == DONE
    patch.undo()
    return folder


def test_one_row_per_step_and_all_files(finished):
    rows = toys.rows_of(finished)
    assert [row["step"] for row in rows] == list(range(20))
    assert [row["bucket"] for row in rows[:2]] == ["1x4x1x1", "1x2x1x1"], "batch shapes mix within a run"
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"], "it learns"
    evaluations = read_rows(finished / "evaluation.jsonl")
    assert [row["step"] for row in evaluations] == [5, 10, 15, 20]
    assert evaluations[0]["input"] == evaluations[-1]["input"], "the same held-out batches every time"
    assert (
        evaluations[-1]["loss"] != evaluations[-1]["ema_0.9/loss"] and evaluations[-1]["loss"] < evaluations[0]["loss"]
    )
    assert sorted(p.name for p in (finished / "samples").iterdir()) == ["step_00000010", "step_00000020"]
    assert json.loads((finished / "config.json").read_text())["packages"]["jax"] == jax.__version__
    assert CheckpointReader(finished).steps() == [15, 20]


def test_stopped_and_resumed_rows_are_bit_equal(finished, tmp_path, capfd):
    for stop in (3, 7, 20):
        assert run(tmp_path, stop_after=stop) == DONE
    assert toys.rows_of(tmp_path) == toys.rows_of(finished), "evaluation or not, interrupted or not"
    out = capfd.readouterr().out
    assert "restored step 7" in out and "starting from step 0 with seed 0" in out
    for part in ("mesh data 1", "parameters", "compiled step for 1x4x1x1 x 16 in", "FLOPs per step", "s/step", "MFU"):
        assert part in out, part


def test_the_loop_runs_without_jit_for_debugging(finished, tmp_path):
    expected = read_rows(finished / "metrics.jsonl")[0]["loss"]
    with jax.disable_jit():
        assert run(tmp_path, stop_after=1) == DONE
    np.testing.assert_allclose(read_rows(tmp_path / "metrics.jsonl")[0]["loss"], expected, rtol=1e-5)


def test_resuming_a_finished_run_does_nothing(finished):
    before = toys.rows_of(finished)
    assert run(finished) == DONE
    assert toys.rows_of(finished) == before


def test_fewer_steps_than_the_run_has_made_are_refused(finished):
    before = (finished / "config.json").read_text()
    with pytest.raises(ConfigError, match="training.steps = 19: .* is at step 20; give at least as many steps"):
        run(finished, toys.experiment(**{"training.steps": 19}))
    assert (finished / "config.json").read_text() == before


def test_resuming_on_eight_then_four_devices_then_one(tmp_path, one_device):
    experiment = toys.experiment()
    experiment = experiment.replace(data=experiment.data.replace(buckets=experiment.data.buckets[:1]))
    for count, stop in ((8, 3), (4, 6), (1, 10)):
        one_device["count"] = count
        assert run(tmp_path / "resumed", experiment, stop_after=stop) == DONE
    assert run(tmp_path / "uninterrupted", experiment, stop_after=10) == DONE
    resumed, uninterrupted = toys.rows_of(tmp_path / "resumed"), toys.rows_of(tmp_path / "uninterrupted")
    assert [row["records"] for row in resumed] == [row["records"] for row in uninterrupted]
    np.testing.assert_allclose([row["loss"] for row in resumed], [row["loss"] for row in uninterrupted], rtol=1e-4)


class Terminating(toys.FakeLoader):
    """Sends this process a signal while the batch of step 6 is read."""

    def at(self, step):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().at(step)


def test_sigterm_saves_and_asks_for_a_restart(finished, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    assert run(tmp_path, make_loader=Terminating) == 75
    assert signal.getsignal(signal.SIGTERM) == before
    assert [row["step"] for row in toys.rows_of(tmp_path)] == list(range(7)), "the step in progress is finished"
    assert CheckpointReader(tmp_path).steps() == [5, 7]
    assert run(tmp_path) == DONE
    assert toys.rows_of(tmp_path) == toys.rows_of(finished)


def test_a_checkpoint_of_another_model_or_data_set_is_refused(tmp_path):
    run(tmp_path, stop_after=1)
    with pytest.raises(ConfigError) as caught:
        run(
            tmp_path,
            toys.experiment(**{"task.layers": 3, "task.width": 16, "seed": 7, "data.sources.0.path": "elsewhere"}),
        )
    message = str(caught.value)
    for line in (
        "task.layers: checkpoint 2, now 3",
        "seed: checkpoint 0, now 7",
        "'nowhere', now 'elsewhere'",
        "--allow-changes",
    ):
        assert line in message, message
    assert "width" not in message
    with pytest.raises(
        ConfigError, match=r"parameters/model/blocks/layers/up/kernel: checkpoint \(2, 16, 32\).*\(3, 16, 32\)"
    ):
        run(tmp_path, toys.experiment(**{"task.layers": 3}), allow_changes=True)
    assert CheckpointReader(tmp_path).steps() == [1], "refusing destroys nothing"
    changed = toys.experiment(**{"data.sources.0.path": "elsewhere"})
    with pytest.raises(ValueError, match="hold other records"):
        accept = toys.experiment(
            **{"data.sources.0.path": "elsewhere", "checkpoint.accept_changes": r"data\.sources.*"}
        )
        run(tmp_path, accept)
    assert run(tmp_path, changed, allow_changes=True, stop_after=2) == DONE
    with pytest.raises(ConfigError, match="already holds checkpoints"):
        run(tmp_path, resume=False)


def test_too_many_bad_steps_stop_the_run_with_their_records(tmp_path, capfd):
    class Poisoned(toys.FakeLoader):
        def at(self, step):
            batch = super().at(step)
            if step >= 6:
                batch.arrays["x"][2] = np.nan
            return batch

    experiment = toys.experiment(**{"training.max_consecutive_skips": 2})
    assert run(tmp_path, experiment, make_loader=Poisoned) == DIVERGED
    rows = toys.rows_of(tmp_path)
    assert [row["step"] for row in rows if row["skipped"]] == [6, 7, 8] and rows[6]["loss"] == "nan"
    out = capfd.readouterr().out
    assert "step 6 was skipped" in out and "consecutive_skips = 3 exceeds training.max_consecutive_skips = 2" in out
    assert f"record-{8 * 16 + 2}" in out.replace("\n", ""), "the message names the records of the batch"
    assert CheckpointReader(tmp_path).steps() == [5]


def test_exit_status_when_the_last_checkpoint_cannot_be_written(tmp_path, monkeypatch, capfd):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    experiment = toys.experiment(**{"checkpoint.every": 3})
    real = Checkpoints.save

    def save(self, step, *arguments):
        if step >= 6:
            monkeypatch.setattr(self._manager, "save", full)
        return real(self, step, *arguments)

    monkeypatch.setattr(Checkpoints, "save", save)
    assert run(tmp_path, experiment, stop_after=8) == UNSAVED
    out = capfd.readouterr().out
    assert out.count("no space left on device") == 2, "steps 6 and 8: the run continued in between"
    assert "step 8 is not saved; the latest checkpoint is step 3." in out
    with pytest.raises(CheckpointError, match="on_failed_save = 'stop'"):
        run(tmp_path, toys.experiment(**{"checkpoint.every": 3, "checkpoint.on_failed_save": "stop"}), stop_after=8)


def test_the_run_is_saved_when_data_cannot_be_read(finished, tmp_path):
    class Failing(toys.FakeLoader):
        def at(self, step):
            if step == 7:
                raise TooManyFailures("3 records could not be decoded")
            return super().at(step)

    with pytest.raises(TooManyFailures, match="3 records"):
        run(tmp_path, make_loader=Failing)
    assert CheckpointReader(tmp_path).steps() == [5, 7]
    assert toys.rows_of(tmp_path) == toys.rows_of(finished)[:7]


def test_inference_reads_the_requested_ema(finished):
    experiment, task, raw, step = load_for_inference(finished, "raw")
    assert step == 20 and experiment.name == "toy" and isinstance(task, toys.ToyTask)
    _, _, averaged, _ = load_for_inference(finished, 0.9)
    _, _, best, _ = load_for_inference(finished)
    pairs = {
        path: (nested.flatten(averaged)[path], nested.flatten(best)[path], value)
        for path, value in nested.flatten(raw).items()
    }
    for path, (ema, default, value) in pairs.items():
        assert np.array_equal(ema, default) and not np.array_equal(ema, value), path
    assert load_for_inference(finished, "0.9", step=15)[3] == 15
    with pytest.raises(ConfigError, match="keeps EMA with decay 0.9"):
        load_for_inference(finished, 0.5)
    with pytest.raises(ConfigError, match="expected a decay"):
        load_for_inference(finished, "fast")
    with pytest.raises(CheckpointError, match="no checkpoints folder"):
        load_for_inference(finished / "samples")


def test_training_starts_from_given_parameters(finished, tmp_path):
    _, _, raw, _ = load_for_inference(finished, "raw")
    write_first_checkpoint(toys.experiment(), tmp_path, jax.tree.map(np.asarray, raw))
    with pytest.raises(ConfigError, match="already holds"):
        write_first_checkpoint(toys.experiment(), tmp_path, raw)
    assert run(tmp_path, stop_after=1) == DONE
    assert toys.rows_of(tmp_path)[0]["loss"] < 0.7 * toys.rows_of(finished)[0]["loss"]


def test_an_unknown_best_metric_is_named(tmp_path):
    changes = {"training.evaluate_every": 5, "checkpoint.best_metric": "psnr"}
    with pytest.raises(ConfigError, match="best_metric = 'psnr': not a metric; evaluation gives .*ema_0.9/loss"):
        run(tmp_path, toys.experiment(**changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training.accumulation": 3}, "batch_size = 16 is not a multiple"),
        ({"training.evaluate_every": 5, "data.evaluation_sources": ""}, "evaluation_sources is empty"),
        ({"checkpoint.best_metric": "loss"}, "must be a multiple of training.evaluate_every"),
        ({"training.spike_decay": 1.5}, "spike_decay"),
        ({"checkpoint.keep_every": 7}, "keep_every = 7"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", toys.experiment(**change))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("steps", [0, -1])
def test_a_run_cannot_stop_before_its_first_step(tmp_path, steps):
    with pytest.raises(ConfigError, match=f"stop_after = {steps}: .* at least 1"):
        run(tmp_path / "run", toys.experiment(), stop_after=steps)
    assert not (tmp_path / "run").exists()


def test_watchdog_reports_a_hang_once_and_only_a_hang(tmp_path):
    seen = threading.Event()
    watchdog = Watchdog(0.15, tmp_path / "stacks.txt", lambda what: seen.set())
    for _ in range(4):
        with watchdog.watching("a quick step"):
            time.sleep(0.05)
    time.sleep(0.3)
    assert watchdog.hangs == 0
    with watchdog.watching("step 7"):
        assert seen.wait(5)
        time.sleep(0.4)
    watchdog.close()
    assert watchdog.hangs == 1
    text = (tmp_path / "stacks.txt").read_text()
    assert "step 7 has taken more than 0.15 s" in text
    assert "test_watchdog_reports_a_hang_once_and_only_a_hang" in text, "the stack of the thread that hangs"


@pytest.mark.parametrize("file", ["in no folder", "blocked"])
def test_a_hang_ends_the_run_although_the_stacks_cannot_be_written(tmp_path, monkeypatch, file):
    monkeypatch.setattr("jvgen.training.watchdog.WRITE_SECONDS", 0.2)
    path = tmp_path / "none" / "stacks.txt"
    if file == "blocked":
        path = tmp_path / "stacks.txt"
        os.mkfifo(path)  # opening it waits for a reader, like a file server that is away
    seen = threading.Event()
    watchdog = Watchdog(0.1, path, lambda what: seen.set())
    with watchdog.watching("step 7"):
        assert seen.wait(5)
    watchdog.close()
    if file == "blocked":
        os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))


def test_training_config_defaults_are_valid():
    TrainingConfig(steps=1).validate()
    CheckpointConfig().validate()
