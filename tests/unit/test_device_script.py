"""The script for a GPU: a section that fails, hangs or is not reached ends none of the others; all run when tiny."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytestmark = pytest.mark.torch
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests import quick_xla  # noqa: E402
from tests.device import gpu, sections  # noqa: E402


def test_sections_are_isolated(tmp_path, monkeypatch):
    """Rows written before a failure or a limit are kept; the exit status says that something failed."""
    program = (
        "import json, pathlib, sys, time\n"
        "name, out = sys.argv[1:3]\n"
        "pathlib.Path(out).write_text(json.dumps({'case': name, 'step_s': 0.5}) + chr(10))\n"
        "if name == 'vae': raise MemoryError('out of memory')\n"
        "if name == 'rollout': time.sleep(60)\n"
        "if name == 'parity': pathlib.Path(out).write_text(json.dumps({'case': 'x', 'failed': 'AssertionError: 1'}))\n"
    )
    run = subprocess.run

    def started(command, **options):
        name, out = command[command.index("--section") + 1], command[command.index("--out") + 1]
        return run([sys.executable, "-c", program, name, out], **options)

    monkeypatch.setattr(gpu, "_card", lambda: "a card")
    monkeypatch.setattr(gpu.subprocess, "run", started)
    monkeypatch.setattr(gpu, "SECTIONS", gpu.SECTIONS | {"rollout": 11})
    # A section without ten seconds left is not begun.
    clock = iter([0.0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, *[gpu.TOTAL - 5.0] * 9])
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(clock))
    out = tmp_path / "gpu.json"
    assert gpu.main(["step_256_ours", "vae", "rollout", "parity", "sampling", "--out", str(out)]) == 1
    found = json.loads(out.read_text())["sections"]
    states = {name: section["state"] for name, section in found.items()}
    assert states == {
        "step_256_ours": "done", "vae": "failed with exit status 1", "rollout": "stopped at its limit of 11 s",
        "parity": "failed", "sampling": "not run: no time left",
    }  # fmt: skip
    assert [len(section["rows"]) for section in found.values()] == [1, 1, 1, 1, 0]
    assert "out of memory" in found["vae"]["error"] and found["parity"]["error"] == "x: AssertionError: 1"
    page = out.with_suffix(".md").read_text()
    assert "a card" in page and "| step_256_ours | 0.5 |" in page and "not run: no time left" in page


def test_every_section_has_a_limit_and_all_fit():
    assert set(gpu.SECTIONS) == set(sections.SECTIONS)
    assert gpu.TOTAL < 8 * 60


def test_a_kernel_that_is_wrong_fails_its_row():
    right = sections._guarded("right", lambda: sections._attention(sections.chunked.attention, 6, 7, 5, 8, "float32"))
    assert right["failed"] == "" and right["gradients"] < 2e-5
    wrong = sections._guarded("wrong", lambda: sections._attention(lambda q, k, v, **_: q, 6, 7, 5, 8, "float32"))
    assert "differ by" in wrong["failed"]


def test_layers_are_cut_to_what_fits():
    size = sections.STEPS["480"]
    assert sections._fitted(size, 141e9).layers == 30
    assert sections._fitted(size, 40e9).layers < 30


@pytest.mark.slow
def test_all_sections_run_at_tiny_sizes(tmp_path):
    quick = {
        "XLA_FLAGS": quick_xla.flags(), "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.device.gpu", "--tiny", "--seconds", "4700", "--out", tmp_path / "gpu.json"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | quick, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    for name, section in json.loads((tmp_path / "gpu.json").read_text())["sections"].items():
        assert section["rows"] and section["state"] == "done", name


# Those of PyTorch while it compiles.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_the_other_side_keeps_what_its_policy_says():
    """Attention of two compiled layers runs twice without anything kept, and once where its output is."""
    import torch

    from tests.benchmarks import dit_step
    from tests.benchmarks.step_timing import TorchStep

    found = {}
    for remat in (sections.Remat.FULL, sections.Remat.SAVE_ATTENTION):
        step = TorchStep(dit_step.case_of("tiny", sections.TINY), None, threads=1)
        sections._remat(step.module, remat, "aot_eager")
        step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step()
        name = "aten::_scaled_dot_product_flash_attention_for_cpu"
        found[remat.value] = {event.key: event.count for event in profile.key_averages()}[name]
        torch._dynamo.reset()
    assert found == {"full": 4, "save_attention": 2}
