"""The benchmarks run, check that both sides do the same work, and write what a reader needs; nothing is timed here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytestmark = [pytest.mark.torch, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks import machine  # noqa: E402

ROWS = {
    "dit_step": {
        "case", "ours_median_s", "ours_min_s", "torch_median_s", "torch_min_s", "ratio_of_medians", "ratio_of_minima",
        "quartile_low", "quartile_high", "ours_compile_s", "loss_difference",
    },
    "image_vae_step": {
        "case", "ours_median_s", "torch_median_s", "ratio_of_medians", "ratio_of_minima", "loss_difference",
    },
    "cv_vae": {
        "case", "what", "ours_frames_s", "cogvideox_frames_s", "time_over_cogvideox", "minima_over_cogvideox",
        "ours_peak_MiB", "cogvideox_peak_MiB", "ours_temporary_MiB", "ours_parameters", "cogvideox_parameters",
    },
    "data": {"cores", "ours_clips_s_core", "torch_clips_s_core", "ratio_of_clips_s", "pixel_difference"},
    "checkpoint": {
        "parameters", "state_MiB", "step_s", "stall_s", "stall_steps", "cost_s", "torch_save_s", "restore_s",
    },
    "world_rollout": {
        "case", "ours_frames_s", "released_frames_s", "cached_frames_s", "speed_over_released", "speed_over_cached",
        "equal_ids", "equal_ids_cached",
    },
    "imagination": {
        "case", "sequences", "at_once", "imagined_frames_s", "simulator", "simulated_frames_s",
        "imagined_over_simulated", "temporary_mib", "compile_s",
    },
    "repvideo": {
        "case", "what", "without_s", "with_s", "ratio_of_medians", "middle_half", "without_MiB", "with_MiB",
        "ratio_of_MiB",
    },
    "epipolar": {
        "case", "what", "dense_s", "chunked_s", "ratio_of_medians", "middle_half", "dense_MiB", "chunked_MiB",
        "ratio_of_MiB", "difference",
    },
    "memory": {"remat", "parameters", "gradients", "saved", "formula", "least", "compiled", "ratio"},
}  # fmt: skip


def test_instructions_are_named(monkeypatch):
    monkeypatch.setattr(machine, "_of_cpuinfo", lambda name: "fma avx2 avx512f")
    for name in machine.AVX2_ONLY:
        monkeypatch.setenv(name, "")
    assert machine.instructions() == "AVX-512"
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    machine.hold_to_avx2()
    assert machine.instructions() == "AVX2 of AVX-512" and os.environ["ATEN_CPU_CAPABILITY"] == "avx2"
    assert os.environ["XLA_FLAGS"] == "--xla_cpu_enable_fast_math=false --xla_cpu_max_isa=AVX2"
    monkeypatch.setattr(machine, "_of_cpuinfo", lambda name: "fma avx2")
    assert machine.instructions() == "AVX2"


@pytest.fixture(scope="module")
def document(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("benchmarks")
    out = folder / "results.json"
    # Compiling is most of the time: what comes out of it need not be fast here, and one program is used twice.
    quick = {
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", "--quick", "--cores", "1", "--out", str(out)],
        cwd=ROOT, env={**os.environ, **quick}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return {**json.loads(out.read_text()), "printed": done.stdout}


def test_every_benchmark_gives_its_fields(document):
    assert set(document["benchmarks"]) == set(ROWS)
    for name, fields in ROWS.items():
        result = document["benchmarks"][name]
        assert result["rows"], name
        for row in result["rows"]:
            assert fields <= set(row), f"{name}: {fields - set(row)}"
            for field, value in row.items():
                assert not isinstance(value, float) or value >= 0, f"{name}: {field} = {value}"
        assert len(result["load_average"]) == 2 and result["settings"] and result["samples"] is not None


def test_the_report_says_what_it_was_measured_on(document):
    machine = document["machine"]
    assert machine["cores_used"] == 1 and len(machine["load_average"]) == 3
    assert {"jax", "torch", "diffusers", "av"} <= set(machine["versions"])
    assert document["command"].startswith("python -m tests.benchmarks --quick")
    for text in ("load average", document["command"], "they measure nothing", "dit_step", "memory"):
        assert text in document["printed"]


def test_both_sides_did_the_same_work(document):
    benchmarks = document["benchmarks"]
    for name in ("dit_step", "image_vae_step"):
        assert all(row["loss_difference"] < 1e-4 for row in benchmarks[name]["rows"])
        for sides in benchmarks[name]["samples"].values():
            assert len({len(side["wall"]) for side in sides.values()}) == 1
    assert all(row["pixel_difference"] <= 1 for row in benchmarks["data"]["rows"])
    assert all(row["equal_ids"] == row["equal_ids_cached"] == 1 for row in benchmarks["world_rollout"]["rows"])


def test_saved_activations_agree_with_the_formula(document):
    """The traced count holds what the policy names, and little else: the blocks' inputs for `full`."""
    (row,) = document["benchmarks"]["memory"]["rows"]
    assert row["remat"] == "full"
    assert row["formula"] <= row["saved"] <= row["formula"] + 0.1
    assert row["least"] <= row["compiled"] * 1.01


@pytest.mark.slow
def test_those_of_data_sets_on_request_run_too(tmp_path):
    names = ("data_index", "data_build", "latents", "cached_clips")
    command = [sys.executable, "-m", "tests.benchmarks", *names, "--quick", "--cores", "1"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert all(f"{name}: " in done.stdout for name in names) and not list(tmp_path.iterdir())


def test_an_unknown_name_is_refused():
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", "dit_stop"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and "dit_step" in done.stderr
