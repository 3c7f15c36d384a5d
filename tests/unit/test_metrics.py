"""Metrics: full precision, one row per step, means that add up, TensorBoard without torch, the console."""

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from jvgen.models.ivideogpt.codebook import usage
from jvgen.tasks.task import CodeUse, Mean
from jvgen.training.telemetry import console
from jvgen.training.telemetry.hooks import RunInfo
from jvgen.training.telemetry.json_lines import JsonLinesFile, read_rows
from jvgen.training.telemetry.metrics import RunningMeans, result_names, to_host
from jvgen.training.telemetry.tensorboard import SummaryWriter
from jvgen.training.telemetry.throughput import host_rss_mib, utilization


def test_numbers_keep_their_type_and_a_mean_of_nothing_is_left_out():
    values = to_host(
        {
            "loss": jnp.float32(0.1),
            "skipped": jnp.int32(1),
            "band": Mean(jnp.float32(3.0), jnp.float32(4.0)),
            "empty": Mean(jnp.float32(0.0), jnp.float32(0.0)),
        }
    )
    assert values == {"loss": float(np.float32(0.1)), "skipped": 1, "band": 0.75}
    assert isinstance(values["skipped"], int)


def test_running_means_are_weighted_by_count():
    means = RunningMeans()
    means.add({"loss": jnp.float32(1), "band": Mean(jnp.float32(2), jnp.float32(1))})
    means.add(
        {
            "loss": jnp.float32(2),
            "band": Mean(jnp.float32(2), jnp.float32(3)),
            "none": Mean(jnp.float32(0), jnp.float32(0)),
        }
    )
    assert means.result() == {"loss": 1.5, "band": 1.0}


def test_use_of_codes_is_counted_over_all_batches():
    """Four batches of two tokens use four of eight codes equally often; none of them uses more than two."""
    batches = [jnp.array([2 * (n % 2), 2 * (n % 2) + 1]) for n in range(4)]
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:2]), ("data",)), PartitionSpec("data"))
    count = jax.jit(
        lambda ids: {"future": CodeUse(usage(ids, 8))}, out_shardings=NamedSharding(sharding.mesh, PartitionSpec())
    )
    means = RunningMeans()
    for ids in batches:
        # Tokens of one batch are on two devices, as on two processes: the counts are those of both.
        means.add(count(jax.device_put(ids, sharding)))
    assert means.result() == pytest.approx({"future/codes_used": 0.5, "future/perplexity": 4.0})
    one = to_host(count(jax.device_put(batches[0], sharding)))
    assert one == pytest.approx({"future/codes_used": 0.25, "future/perplexity": 2.0})
    assert result_names({"loss": Mean(1.0, 1.0), "future": CodeUse(1.0)}) == ["loss", *one]


def test_floats_are_read_back_bit_equal(tmp_path):
    values = [float(v) for v in np.random.default_rng(0).standard_normal(50).astype(np.float32)] + [1e-45, 1 / 3]
    log = JsonLinesFile(tmp_path / "m.jsonl", 0)
    for step, value in enumerate(values):
        log.write({"step": step, "loss": value})
    log.close()
    assert [row["loss"] for row in read_rows(tmp_path / "m.jsonl")] == values


def test_not_a_number_is_text_in_strict_json(tmp_path):
    log = JsonLinesFile(tmp_path / "m.jsonl", 0)
    log.write({"step": 0, "loss": math.nan, "norm": math.inf})
    log.close()

    def refuse(text):
        raise AssertionError(text)

    assert json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=refuse) == {
        "step": 0,
        "loss": "nan",
        "norm": "inf",
    }


def test_opening_drops_rows_from_the_restored_step_on_and_a_torn_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps({"step": s, "loss": s}) + "\n" for s in range(6)) + '{"step": 6, "lo')
    log = JsonLinesFile(path, 4)
    log.write({"step": 4, "loss": -4})
    log.close()
    assert [(row["step"], row["loss"]) for row in read_rows(path)] == [(0, 0), (1, 1), (2, 2), (3, 3), (4, -4)]
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


@pytest.mark.parametrize("frames", [1, 4])
def test_tensorboard_gets_scalars_text_and_clips(tmp_path, frames):
    summaries = SummaryWriter(tmp_path, 0)
    summaries.scalars(3, {"loss": 0.5, "bucket": "a"})
    summaries.text(0, "config", "a = 1\nb = 2")
    summaries.clips(3, "sample", np.zeros((2, frames, 8, 8, 3), np.uint8))
    summaries.close()
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"loss" in content and b"sample" in content and (b"GIF89a" if frames > 1 else b"PNG") in content
    assert b"bucket" not in content


def test_training_does_not_import_torch(tmp_path):
    code = (
        "import sys; from pathlib import Path; import jvgen.training.loop\n"
        "from jvgen.training.telemetry.tensorboard import SummaryWriter\n"
        f"SummaryWriter(Path({str(tmp_path)!r}), 0).close()\n"
        "sys.exit(bool({'torch', 'tensorflow', 'wandb'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_utilization_is_the_printed_formula():
    assert utilization({"a": 6e12, "b": 4e12}, 0.5, 4, 10e12) == 10e12 / (0.5 * 4 * 10e12)
    assert utilization({"a": 1.0}, 0.5, 4, None) is None and utilization({}, 0.5, 4, 1.0) is None


def test_host_memory_is_plausible():
    assert 50 < host_rss_mib() < 100_000


def test_a_log_line_is_complete():
    row = {
        "step": 9, "loss": 0.5, "gradient_norm": 1.5, "seconds": 0.25, "frames_per_second": 64.0, "mfu": 0.4,
        "data_wait": 0.1, "host_rss_mib": 512.0, "skipped": 0,
    }  # fmt: skip
    line = console.step_line(row, 100)
    for part in (
        "step 10/100",
        "loss 0.5",
        "grad 1.5",
        "0.25 s/step",
        "64 frames/s",
        "MFU 40.0%",
        "data wait 10%",
        "512 MiB",
    ):
        assert part in line
    assert "SKIPPED" in console.step_line(row | {"skipped": True}, 100)


def test_a_terminal_gets_a_progress_bar_and_a_log_file_plain_lines():
    run = RunInfo(experiment=None, workdir=Path(), start_step=2, document={})
    row = {"step": 4, "loss": 0.25, "seconds": 1.0, "frames_per_second": 1.0, "mfu": None, "data_wait": 0.0}
    for terminal in (True, False):
        output = io.StringIO()
        printer = Console(file=output, force_terminal=terminal, width=120, highlight=False)
        log = console.ConsoleLog("demo", 10, 5, printer)
        log.on_start(run)
        log.on_step(row | {"skipped": 0, "host_rss_mib": 1.0})
        log.log("a line [with] brackets")
        log.on_evaluation(5, {"loss": 0.5, "seconds": 2.0})
        log.on_end(0)
        assert "a line [with] brackets" in output.getvalue()
        assert "step 5/10" in output.getvalue() and "evaluation at step 5 (2.0 s)  loss 0.5" in output.getvalue()
        assert ("demo" in output.getvalue()) == terminal and ("\x1b" in output.getvalue()) == terminal
