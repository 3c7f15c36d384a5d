"""How a command ends: users' mistakes in one message, everything else whole in the run's error file or printed."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jvgen import config
from jvgen.cli import main as cli
from jvgen.config import ConfigError
from jvgen.data.stream.quarantine import TooManyFailures
from jvgen.demo.stages import DemoFailed
from jvgen.parallel import failing
from jvgen.preflight import check
from jvgen.saved_config import digest
from jvgen.training import loop
from jvgen.training.checkpoint.reader import CheckpointError


@pytest.fixture
def words(vae_words, tmp_path) -> list[str]:
    """A valid `jvgen train` in a new run directory."""
    return ["train", *map(str, vae_words), "--workdir", str(tmp_path / "new_run")]


@pytest.mark.parametrize(
    "error", [CheckpointError("lost"), TooManyFailures("lost"), DemoFailed("lost"), ConfigError("lost")]
)
def test_user_errors_print_no_traceback(error, words, jvgen, monkeypatch):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(check, "check", lambda *arguments: None)
    monkeypatch.setattr(loop, "train", fail)
    done = jvgen(*words)
    assert done.status == 2 and done.err.startswith("jvgen train: lost\n") and "Traceback" not in done.err, done.err


OTHERS_ERRORS = {
    "a key": lambda: {}["ours"],
    "a type": lambda: len(3),
    "a number": lambda: int("ours"),
    "numpy": lambda: np.zeros(3).reshape(2, 2),
    "jax": lambda: jax.numpy.zeros(3).reshape(2, 2),
    "json": lambda: json.loads("{"),
    "bytes": lambda: b"\xff".decode(),
}


@pytest.mark.parametrize("kind", OTHERS_ERRORS)
def test_other_errors_are_written_whole_into_the_error_file(kind, words, jvgen, monkeypatch):
    def fail(*arguments, **options):
        OTHERS_ERRORS[kind]()

    monkeypatch.setattr(check, "check", lambda *arguments: None)
    monkeypatch.setattr(loop, "train", fail)
    done = jvgen(*words)
    file = Path(words[-1]) / "errors" / "process_0.txt"
    written = file.read_text()
    assert done.status == 1 and f"(the traceback is in {file})" in done.err and done.err.count("\n") == 1, done.err
    experiment = config.override(config.load(words[1]), words[3:-2:2])
    expected = ("Traceback (most recent call last)", "in fail", "command: ", "JAX 0.", "Python 3.", "exit code 1",
                f"config: {digest(experiment)}")  # fmt: skip
    assert [word for word in expected if word not in written] == []


def test_other_errors_keep_their_traceback(words, monkeypatch):
    """Of commands without a run directory, or if its error file cannot be written."""

    def fail(*arguments, **options):
        raise KeyError("ours")

    monkeypatch.setattr(check, "check", fail)
    monkeypatch.setattr(config, "dump", fail)
    with pytest.raises(KeyError, match="ours"):
        cli.main(["config", "show", *words[1:-2]])
    with pytest.raises(KeyError, match="ours"):
        monkeypatch.setattr(failing, "write_text", fail)
        cli.main(words)
    monkeypatch.undo()
    monkeypatch.setenv("JVGEN_TRACEBACK", "1")
    with pytest.raises(ValueError, match=r"training\.stepz"):
        cli.main([*words, "--set", "training.stepz=3"])
