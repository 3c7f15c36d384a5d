"""Imports that are refused or interrupted leave no run directory behind, and check what training checks."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import toys  # noqa: E402
from tiny_exports import DENOISER, drawn  # noqa: E402

from jvgen import config  # noqa: E402
from jvgen.config import ConfigError, validate_tree  # noqa: E402
from jvgen.interop.to_torch import export_network  # noqa: E402
from jvgen.runs.exporting import import_run  # noqa: E402
from jvgen.training.checkpoint.initial import (  # noqa: E402
    UNFINISHED,
    imported_weights,
    saved_steps,
    write_first_checkpoint,
)
from jvgen.training.checkpoint.manager import Checkpoints  # noqa: E402

CONFIGS = Path(__file__).parents[2] / "configs"
TEXT_TO_VIDEO, WORLD_MODEL = CONFIGS / "demo_text_to_video.py", CONFIGS / "demo_ivideogpt_transformer.py"


def loaded(path: Path, *changes: str):
    return config.override(config.load(path), changes)


def test_an_image_to_video_network_in_a_text_to_video_config():
    """The step would have failed in a product of matrices."""
    for path in (CONFIGS / "cogvideox_2b.py", TEXT_TO_VIDEO):
        wide = loaded(path, "task.denoiser.in_channels=32")
        with pytest.raises(ConfigError, match="in_channels = 32, out_channels = .*an image-to-video network"):
            validate_tree(wide)


# Name: config, its changes, what is said. Weights are those of an image-to-video network.
REFUSED = {
    "image to video": (TEXT_TO_VIDEO, (), "in_channels = 8, out_channels = 4: an image-to-video network"),
    "no tokenizer": (WORLD_MODEL, ("task.tokenizer_weights=none",), "task.tokenizer_weights = none"),
    "tokenizer that is not there": (WORLD_MODEL, ("task.tokenizer_weights=nowhere",), "'nowhere': no such file"),
    "VAE that is not there": (TEXT_TO_VIDEO, ("task.vae_weights=nowhere",), "'nowhere': no such file"),
}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"init_gates": True}, "--init-gates: no network of the run has gates"),
        ({"init_condition": True}, "--init-condition: the run's task has no condition"),
        (
            {"inflate": True, "init_gates": True, "allow_partial": True},
            "--init-gates, --allow-partial: not valid with --inflate",
        ),
        ({"network": "vae"}, "--network vae: the task trains denoiser, text_encoder"),
    ],
)
def test_flags_that_would_change_nothing_are_refused(flags, said, tmp_path):
    weights = export_network(DENOISER, drawn(DENOISER), tmp_path / "weights")
    experiment = loaded(TEXT_TO_VIDEO, "task.vae_weights=none")
    experiment = experiment.replace(task=experiment.task.replace(vae=None, latents="data"))
    with pytest.raises(ConfigError, match=said):
        import_run(weights, experiment, tmp_path / "run", **flags)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_imports_leave_nothing(name, tmp_path):
    path, changes, said = REFUSED[name]
    weights = export_network(
        wide := DENOISER.replace(in_channels=8, aggregation=None), drawn(wide), tmp_path / "weights"
    )
    if name == "image to video":
        changes = ("task.vae_weights=none",)
    experiment = loaded(path, *changes)
    if name == "image to video":
        experiment = experiment.replace(task=experiment.task.replace(vae=None, latents="data"))
    with pytest.raises(ValueError, match=said):
        import_run(weights, experiment, tmp_path / "run", network="denoiser" if path == TEXT_TO_VIDEO else None)
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def failing(error: BaseException):
    def save(*arguments, **options):
        raise error

    return save


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("existing", [False, True])
def test_failed_imports_leave_what_was_there(error, existing, tmp_path, monkeypatch):
    run = tmp_path / "run"
    if existing:
        run.mkdir()
        (run / "notes.txt").write_text("mine")
    monkeypatch.setattr(Checkpoints, "save", failing(error))
    with pytest.raises(type(error)):
        write_first_checkpoint(toys.experiment(), run, {})
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == (["run", "run/notes.txt"] if existing else [])


def test_a_config_that_cannot_be_built_makes_no_directory(tmp_path):
    experiment = toys.experiment()
    wrong = experiment.replace(optimizers={"nobody": experiment.optimizer})
    with pytest.raises(ConfigError, match="'nobody' is not an objective"):
        write_first_checkpoint(wrong, tmp_path / "run", {})
    assert not list(tmp_path.iterdir())


def test_what_a_killed_import_left_is_replaced(tmp_path):
    """Also a checkpoint that was complete when only the mark of an unfinished import was still to be removed."""
    run = tmp_path / "run"
    write_first_checkpoint(toys.experiment(), run, {}, [{"network": "model", "path": "other", "digest": "0"}])
    (run / UNFINISHED).write_text("")
    given = jax.tree.map(np.asarray, toys.experiment().task.build().init(jax.random.key(7)))
    write_first_checkpoint(toys.experiment(), run, given)
    assert saved_steps(run) == ["0"] and not (run / UNFINISHED).exists()
    assert imported_weights(run / "checkpoints" / "0") == []
    with pytest.raises(ConfigError, match="already holds checkpoints of steps 0"):
        write_first_checkpoint(toys.experiment(), run, given)
