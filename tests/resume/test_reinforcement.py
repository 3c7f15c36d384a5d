"""A run that acts, imagines and trains, in a process of its own: killed and restarted, it is bit-equal to one that was
not: rows, replays, the episode under way, and the arrays of the last checkpoint."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from toys import rows_of  # noqa: E402

from jvgen.storage import as_path  # noqa: E402
from jvgen.training.checkpoint.restore import load_for_inference  # noqa: E402
from jvgen.training.telemetry.json_lines import read_rows  # noqa: E402
from tests import quick_xla  # noqa: E402
from tests import tiny_reinforcement as tiny  # noqa: E402

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
STEPS = 22
CONFIG = """
from tests import tiny_reinforcement

def experiment():
    return tiny_reinforcement.experiment({source!r}, {steps})
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A config of the run, and the environment of its processes, which share compiled programs."""
    folder = tmp_path_factory.mktemp("reinforcement")
    tiny.scenes(folder / "scenes")
    (folder / "config.py").write_text(CONFIG.format(source=str(folder / "scenes"), steps=STEPS))
    return folder / "config.py", os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": quick_xla.flags(),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def start(prepared, folder: Path) -> subprocess.Popen:
    config, environment = prepared
    return subprocess.Popen(
        [sys.executable, "-m", "jvgen.cli", "train", config, "--workdir", folder],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def kill_at(process: subprocess.Popen, folder: Path, step: int) -> None:
    while not any(row["step"] >= step for row in read_rows(folder / "metrics.jsonl")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_a_killed_run_resumes_bit_equal(prepared, tmp_path):
    whole = start(prepared, tmp_path / "whole")
    output = whole.communicate()[0]
    assert whole.returncode == 0, output
    killed = tmp_path / "killed"
    # In an episode (they have 6 steps and start at step 2), and right after the rollouts of step 12.
    for step in (10, 13):
        kill_at(start(prepared, killed), killed, step)
    last = start(prepared, killed)
    output = last.communicate()[0]
    assert last.returncode == 0 and "restored step" in output and "WARNING: the environment" not in output, output

    rows = rows_of(killed)
    assert rows == rows_of(tmp_path / "whole") and [row["step"] for row in rows] == list(range(STEPS))
    evaluations = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in read_rows(folder / "evaluation.jsonl")]
        for folder in (killed, tmp_path / "whole")
    ]
    assert evaluations[0] == evaluations[1] and {row["step"] for row in evaluations[0]} == {10, 20, STEPS}
    _, _, ours, at = load_for_inference(as_path(killed))
    _, _, theirs, _ = load_for_inference(as_path(tmp_path / "whole"))
    assert at == STEPS
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))
    for ring in ("real", "imagined"):
        for file in sorted((killed / "replay" / ring).glob("*.npy")):
            theirs = np.load(tmp_path / "whole" / "replay" / ring / file.name)
            np.testing.assert_array_equal(np.load(file), theirs, err_msg=f"{ring} {file.name}")

    # What was acted, imagined and trained when.
    acted = [row["environment_steps"] for row in rows]
    assert acted[:3] == [12, 12, 13] and acted[-1] == 12 + STEPS - 2
    assert [row["step"] for row in rows if "imagined_reward" in row] == [2, 7, 12, 17]
    assert [row["step"] for row in rows if "episode_return" in row] == [7, 13, 19]
    assert [row["step"] for row in rows if "transformer/loss" in row] == [0, 1, *range(2, STEPS, 2)]
    assert [row["step"] for row in rows if "tokenizer/loss" in row] == [0, 1, *range(2, STEPS, 4)]
