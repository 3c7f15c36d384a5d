"""What is saved is finite, in a directory that one start holds, and before it is evaluated."""

import json
import os
import sys
import time
import types
from pathlib import Path

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import toys  # noqa: E402

from jvgen import exit_codes  # noqa: E402
from jvgen.config import ConfigError  # noqa: E402
from jvgen.storage import StorageUnavailable  # noqa: E402
from jvgen.training import run_lock  # noqa: E402
from jvgen.training.checkpoint import messages  # noqa: E402
from jvgen.training.checkpoint.manager import Checkpoints, NonFiniteState, SaveFailed  # noqa: E402
from jvgen.training.config import CheckpointConfig  # noqa: E402
from jvgen.training.evaluation import Evaluator  # noqa: E402
from jvgen.training.evaluation_failures import EvaluationFailures  # noqa: E402
from jvgen.training.loop import train  # noqa: E402
from jvgen.training.telemetry.json_lines import read_rows  # noqa: E402
from jvgen.training.watchdog import Watchdog  # noqa: E402


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["optimizer.learning_rate", "training.spike_sigma", "ema.decays"])
def test_numbers_of_a_config_are_finite(tmp_path, field, value):
    with pytest.raises(ConfigError, match=rf"{field}.* = {value}: expected a finite number"):
        train(toys.experiment(**{field: value}), tmp_path / "run", make_loader=toys.FakeLoader)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [jnp.nan, -jnp.inf])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, value):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_last=1))
    good = {"parameters/a": jnp.ones(8), "parameters/b": jnp.ones((2, 3)), "step": jnp.int32(1)}
    checkpoints.save(1, good, {}, {})
    checkpoints.wait()
    with pytest.raises(NonFiniteState, match="step 2 is not saved: NaN or infinity in parameters/b. Checkpoints: 1"):
        checkpoints.save(2, good | {"parameters/b": good["parameters/b"].at[1, 2].set(value)}, {}, {})
    assert NonFiniteState.exit_code == exit_codes.DIVERGED
    checkpoints.close()
    assert steps(tmp_path) == [1]


def test_failed_saves_end_the_run_after_some_in_a_row(tmp_path, monkeypatch):
    logged: list[str] = []
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(max_failed_saves=2), log=logged.append)
    arrays = {"parameters/a": jnp.ones(8)}

    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    def failing(step: int) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(checkpoints._manager, "save", fail)
            checkpoints.save(step, arrays, {}, {})

    failing(1)
    checkpoints.save(2, arrays, {}, {})
    assert checkpoints.wait()
    failing(3)
    assert len(logged) == 2 and "step 3" in logged[1] and "Intact checkpoints: 2" in logged[1]
    with pytest.raises(SaveFailed, match="It stops after 2 failed saves in a row") as error:
        failing(4)
    assert error.value.exit_code == exit_codes.UNSAVED
    checkpoints._manager.close()


def test_a_bare_exception_while_reading_counts_as_corrupt(tmp_path, monkeypatch):
    """Orbax raises one for some damages of compressed files."""
    logged: list[str] = []
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(), log=logged.append)
    arrays = {"parameters/a": jnp.ones(8)}
    for step in (1, 2):
        checkpoints.save(step, arrays, {}, {})
    checkpoints.wait()
    restore = ocp.PyTreeCheckpointHandler.restore

    def fail(handler, folder, *arguments, **options):
        if folder.parent.name == "2":
            raise Exception("zstd")
        return restore(handler, folder, *arguments, **options)

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", fail)
    assert checkpoints.restore(arrays).step == 1
    assert "checkpoint" in logged[0] and "zstd" in logged[0] and (tmp_path / "corrupt" / "2").is_dir()
    checkpoints.close()


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), PermissionError(13, "denied", "file")])
def test_storage_that_is_away_is_not_corruption(tmp_path, monkeypatch, error):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(1, {"parameters/a": jnp.ones(8)}, {}, {})
    checkpoints.wait()

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", fail)
    with pytest.raises(type(error)):
        checkpoints.restore({"parameters/a": jnp.ones(8)})
    monkeypatch.undo()
    assert steps(tmp_path) == [1] and not (tmp_path / "corrupt").exists()
    checkpoints.close()


def test_a_step_is_saved_before_it_is_evaluated(tmp_path, monkeypatch):
    settings = {"training.evaluate_every": 5, "training.evaluation_batches": 2, "training.steps": 10}
    experiment = toys.experiment(**settings, **{"checkpoint.every": 10})

    def fail(*arguments, **options):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(Evaluator, "evaluate", fail)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="out of memory"):
                train(experiment, tmp_path, make_loader=toys.FakeLoader)
            assert steps(tmp_path) == [5] and [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [
                *range(5)
            ]
        assert (tmp_path / "errors" / "process_0.txt").read_text().count("out of memory") >= 2
        # The third start leaves the evaluation of step 5 out, and fails at that of step 10.
        with pytest.raises(RuntimeError, match="out of memory"):
            train(experiment, tmp_path, make_loader=toys.FakeLoader)
    assert steps(tmp_path) == [5, 10]
    assert train(experiment, tmp_path, make_loader=toys.FakeLoader) == exit_codes.DONE
    assert [row["step"] for row in read_rows(tmp_path / "evaluation.jsonl")] == [10]


def test_a_misspelled_best_metric_is_found_before_the_first_step(tmp_path):
    settings = {"training.evaluate_every": 5, "checkpoint.every": 5, "checkpoint.best_metric": "losss"}
    with pytest.raises(
        ConfigError, match=r"best_metric = 'losss': not a metric; evaluation gives .*ema_0.9/loss.* loss"
    ):
        train(toys.experiment(**settings), tmp_path, make_loader=toys.FakeLoader)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_an_evaluation_is_left_out_after_two_failures_of_the_same_step(tmp_path):
    failures = EvaluationFailures(tmp_path)
    assert [failures.begin(step) for step in (5, 5, 5, 10)] == [True, True, False, True]
    failures.end()
    assert [failures.begin(10), failures.begin(10)] == [True, True]


def test_of_two_starts_at_the_same_moment_one_goes_on(tmp_path, monkeypatch):
    """Both have found no lock, and the other one has written it last."""
    real = run_lock._acquire

    def overtaken(workdir, log):
        token = real(workdir, log)
        (workdir / "lock.json").write_text(json.dumps({"token": "other", "host": "b", "pid": 7, "started": "now"}))
        return token

    monkeypatch.setattr(run_lock, "_acquire", overtaken)
    with pytest.raises(run_lock.LockLost, match="held by this run but by process 7 on b"):
        train(toys.experiment(), tmp_path, make_loader=toys.FakeLoader)
    assert not (tmp_path / "metrics.jsonl").exists() and not steps(tmp_path)
    assert json.loads((tmp_path / "lock.json").read_text())["token"] == "other"


def test_storage_that_is_away_is_no_lost_lock(tmp_path, monkeypatch):
    def away(path):
        raise StorageUnavailable("cannot read the lock")

    with run_lock.held(tmp_path, print) as lock:
        with monkeypatch.context() as patched:
            patched.setattr(run_lock.storage, "read_text", away)
            with pytest.raises(StorageUnavailable):
                lock.check()
        lock.check()


def test_a_lock_is_released_and_a_live_one_refused(tmp_path, monkeypatch):
    with run_lock.held(tmp_path, print) as lock:
        lock.check()
        assert run_lock.read_token(tmp_path) == lock.token
        holder = json.loads((tmp_path / "lock.json").read_text())
        # As another process of this machine that is alive.
        (tmp_path / "lock.json").write_text(
            json.dumps(holder | {"pid": os.getppid(), "birth": run_lock._birth(os.getppid())})
        )
        with (
            pytest.raises(ConfigError, match=f"is in use by process {os.getppid()} on "),
            run_lock.held(tmp_path, print),
        ):
            pass
        (tmp_path / "lock.json").write_text(json.dumps(holder | {"token": "other"}))
        with pytest.raises(run_lock.LockLost, match="no longer held by this run but by process"):
            lock.check()
    assert (tmp_path / "lock.json").exists(), "the lock of the other start is left alone"


@pytest.mark.parametrize("alive", [True, False])
def test_a_holder_on_another_machine_is_dead_without_heartbeats(tmp_path, monkeypatch, alive):
    monkeypatch.setattr(run_lock, "LEASE_SECONDS", 0.5)
    holder = {"token": "t", "host": "far", "pid": 1, "started": "then", "machine": "far away", "birth": "1"}
    (tmp_path / "lock.json").write_text(json.dumps(holder))
    (tmp_path / "lock_heartbeat.json").write_text(json.dumps({"token": "t", "count": 1}))
    if alive:
        count = iter(range(100))
        monkeypatch.setattr(
            run_lock.time, "sleep",
            lambda seconds: (tmp_path / "lock_heartbeat.json").write_text(json.dumps({"count": 100 + next(count)})),
        )  # fmt: skip
        with pytest.raises(ConfigError, match="in use by process 1 on far"), run_lock.held(tmp_path, print):
            pass
        return
    logged: list[str] = []
    with run_lock.held(tmp_path, logged.append):
        assert "taking over the run directory from process 1 on far" in logged[-1]
    assert not (tmp_path / "lock.json").exists()


def test_the_limit_of_the_watchdog_follows_the_median_step():
    watchdog = Watchdog(None)
    assert watchdog.limit() == 600 and watchdog.limit(3) == 1800
    for seconds in (80.0, 100.0, 1000.0):
        watchdog.record_step(seconds)
    assert watchdog.limit() == 1000
    watchdog.close()
    assert Watchdog(0.0)._thread is None


def test_nested_sections_of_the_watchdog_have_their_own_limits(tmp_path):
    hung: list[str] = []
    watchdog = Watchdog(0.3, tmp_path / "stacks.txt", hung.append)
    with watchdog.watching("outer"):
        time.sleep(0.2)
        with watchdog.watching("inner", times=10):
            time.sleep(0.5)
        assert not hung
        time.sleep(0.6)
    watchdog.close()
    assert hung == ["outer has taken more than 0.3 s"]


def test_only_late_reads_of_a_corrupt_checkpoint_are_dropped(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    messages.drop_late_reads()
    messages.drop_late_reads()
    late, other = (
        types.SimpleNamespace(exc_value=RuntimeError(text)) for text in ("Event loop is closed", "anything else")
    )
    sys.unraisablehook(late)
    sys.unraisablehook(other)
    assert shown == [other]
