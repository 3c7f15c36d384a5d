"""Hooks of the training loop: which events they get, errors that name them, Weights & Biases."""

import errno
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import toys  # noqa: E402

from jvgen import exit_codes  # noqa: E402
from jvgen.config import ConfigError  # noqa: E402
from jvgen.parallel.mesh import make_mesh  # noqa: E402
from jvgen.training import session  # noqa: E402
from jvgen.training.config import WandbConfig  # noqa: E402
from jvgen.training.loop import train  # noqa: E402
from jvgen.training.telemetry.hooks import Hook, HookError, HookList, RunInfo  # noqa: E402
from jvgen.training.telemetry.json_lines import read_rows  # noqa: E402
from jvgen.training.telemetry.weights_and_biases import WeightsAndBiases  # noqa: E402


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(session, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))


class Recorder(Hook):
    """Every event in order; also the rows that are on disk at the events of a checkpoint."""

    def __init__(self):
        self.events = []

    def on_start(self, run):
        self.workdir = run.workdir
        self.events.append(("start", run.start_step, run.experiment.name, run.document["experiment"]["name"]))

    def on_step(self, row):
        self.events.append(("step", row["step"], row["loss"]))

    def on_evaluation(self, step, values):
        self.events.append(("evaluation", step, values["loss"], values["seconds"] > 0))

    def on_samples(self, step, clips):
        self.events.append(("samples", step, {name: clip.dtype for name, clip in clips.items()}))

    def on_checkpoint(self, step):
        assert (self.workdir / "checkpoints" / str(step)).is_dir()
        self.events.append(("checkpoint", step))

    def on_end(self, status):
        self.events.append(("end", status))


def test_hooks_get_every_event_in_order(tmp_path, quick_compilations):
    changes = {
        "training.steps": 4, "training.evaluate_every": 2, "training.visualize_every": 4,
        "training.evaluation_batches": 1, "checkpoint.every": 2,
    }  # fmt: skip
    experiment, recorder = toys.experiment(**changes), Recorder()
    assert train(experiment, tmp_path, hooks=[recorder], stop_after=2, make_loader=toys.FakeLoader) == 0
    assert train(experiment, tmp_path, hooks=[recorder], make_loader=toys.FakeLoader) == 0
    rows, evaluations = read_rows(tmp_path / "metrics.jsonl"), read_rows(tmp_path / "evaluation.jsonl")
    steps = [("step", row["step"], row["loss"]) for row in rows]
    evaluated = [("evaluation", row["step"], row["loss"], True) for row in evaluations]
    assert recorder.events == [
        ("start", 0, "toy", "toy"), *steps[:2], evaluated[0], ("checkpoint", 2), ("end", 0),
        ("start", 2, "toy", "toy"), *steps[2:], evaluated[1], ("samples", 4, {"input": np.uint8}),
        ("checkpoint", 4), ("end", 0),
    ]  # fmt: skip


class Failing(Hook):
    def on_step(self, row):
        if row["step"] == 1:
            raise KeyError("no such metric")


def test_a_hook_that_raises_ends_the_run_and_is_named(tmp_path, quick_compilations):
    recorder = Recorder()
    with pytest.raises(HookError, match=r"test_hooks\.Failing failed in on_step: KeyError: 'no such metric'"):
        train(toys.experiment(), tmp_path, hooks=[Failing(), recorder], make_loader=toys.FakeLoader)
    assert [event[:2] for event in recorder.events] == [("start", 0), ("step", 0), ("end", None)]
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0, 1], "files are written first"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), exit_codes.UNSAVED),
        (OSError(errno.ESTALE, "Stale file handle"), 75),
        (KeyError("x"), exit_codes.ERROR),
    ],
)
def test_a_hook_that_cannot_write_gives_the_exit_code_of_its_error(error, code):
    class Full(Hook):
        def on_step(self, row):
            raise error

    with pytest.raises(HookError) as caught:
        HookList([Full()]).on_step({})
    assert exit_codes.of_error(caught.value) == code
    assert hasattr(caught.value, "exit_code") == (code != exit_codes.ERROR), "unexpected errors keep their traceback"


class FakeWandb(types.ModuleType):
    """The part of the interface of `wandb` that is used."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.metrics, self.logged, self.finished = [], [], [], []
        self.Settings = self.Image = self.Video = lambda *arguments, **options: (arguments, options)

    def init(self, **options):
        self.started.append(options)
        run = types.SimpleNamespace(
            define_metric=lambda *names, **options: self.metrics.append((names, options)),
            log=self.logged.append,
            finish=lambda exit_code: self.finished.append(exit_code),
        )
        return run


def drive(config: WandbConfig, workdir: Path) -> None:
    """The events of one start of a run."""
    hook = WeightsAndBiases(config)
    hook.on_start(RunInfo(toys.experiment(), workdir, 0, {"git": "abc"}))
    hook.on_step({"step": 0, "loss": 0.5, "bucket": "1x4x1x1", "mfu": None})
    hook.on_evaluation(1, {"loss": 0.25, "seconds": 1.0})
    hook.on_samples(1, {"sample": np.zeros((1, 3, 16, 16, 3), np.uint8), "frame": np.zeros((1, 1, 8, 8, 3), np.uint8)})
    hook.on_end(0)


def test_weights_and_biases_gets_numbers_samples_and_one_run_per_directory(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        drive(WandbConfig(project="videos"), tmp_path)
    first, second = fake.started
    assert first["project"] == "videos" and first["name"] == "toy" and first["config"] == {"git": "abc"}
    assert first["id"] == second["id"] and second["resume"] == "allow" and first["mode"] == "online"
    step, evaluation, samples = fake.logged[:3]
    assert step == {"step": 0, "loss": 0.5}
    assert evaluation == {"step": 1, "evaluation/loss": 0.25, "evaluation/seconds": 1.0}
    assert samples["step"] == 1 and len(samples["samples/sample"]) == len(samples["samples/frame"]) == 1
    assert fake.finished == [0, 0]


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    """With the real package, where it is installed: a run is written to the run directory and nothing is sent."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    drive(WandbConfig(project="videos", mode="offline"), tmp_path)
    [folder] = (tmp_path / "wandb").glob("offline-run-*")
    assert list(folder.glob("run-*.wandb")) and len(list(folder.rglob("*.mp4"))) == 1
    assert (tmp_path / "wandb_run_id").read_text() in folder.name


def test_a_missing_package_is_named_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    experiment = toys.experiment(**{"training.wandb.project": "videos"})
    with pytest.raises(ConfigError, match=r"training.wandb.project = 'videos' needs the package wandb"):
        train(experiment, tmp_path / "run", make_loader=toys.FakeLoader)
    assert not (tmp_path / "run").exists()
