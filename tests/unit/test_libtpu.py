"""libtpu on a machine without a TPU: no messages, and a TPU that may be there is not hidden."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jvgen.parallel import libtpu

ROOT = Path(__file__).parents[2]


def machine(root: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return str(root)


def pci(number: int, vendor: str, device: str) -> dict[str, str]:
    folder = f"sys/bus/pci/devices/0000:00:0{number}.0"
    return {f"{folder}/vendor": f"{vendor}\n", f"{folder}/device": f"{device}\n"}


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, False),
        (pci(1, "0x8086", "0x1237") | pci(2, "0x10de", "0x2330"), False),
        (pci(3, "0x1ae0", "0x0042"), False),  # the network card of a machine in Google's cloud
        (pci(3, "0x1ae0", "0x0042") | pci(4, "0x1ae0", "0x0063"), True),
        (pci(3, "0x1ae0", "0xffff"), True),  # a chip that is not known yet
        ({"dev/accel0": ""}, True),
        ({"dev/vfio/0": "", "dev/vfio/vfio": ""}, True),
        ({"dev/vfio/vfio": ""}, False),
    ],
)
def test_signs_of_a_tpu(tmp_path, files, expected):
    assert libtpu.tpu_may_be_attached(machine(tmp_path, files)) is expected


@pytest.mark.parametrize(
    "environment, files, expected",
    [
        ({}, {}, True),
        ({"JAX_PLATFORMS": ""}, {}, True),
        ({"JAX_PLATFORMS": "tpu,cpu"}, {}, True),
        ({"JAX_PLATFORMS": "cpu"}, {}, False),
        ({"JAX_FORCE_TPU_INIT": "1"}, {}, False),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, {}, False),
        ({"TPU_NAME": "mine"}, {}, False),
        ({}, {"dev/accel0": ""}, False),
    ],
)
def test_variables_are_set_only_where_no_tpu_can_be(tmp_path, monkeypatch, environment, files, expected):
    monkeypatch.setattr(libtpu, "is_installed", lambda: True)
    changed = dict(environment)
    libtpu.silence_without_tpu(changed, machine(tmp_path, files))
    assert changed == environment | (libtpu.WITHOUT_TPU if expected else {})
    monkeypatch.setattr(libtpu, "is_installed", lambda: False)
    changed = dict(environment)
    libtpu.silence_without_tpu(changed, machine(tmp_path, files))
    assert changed == environment


@pytest.mark.parametrize("before", [None, "--xla_enable_async_all_gather=true"])
def test_bundles_are_written_to_a_folder_that_lasts_as_long_as_it_is_needed(monkeypatch, before):
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    if before is not None:
        monkeypatch.setenv("LIBTPU_INIT_ARGS", before)
    assert libtpu.bundles_folder() is None
    with libtpu.writing_bundles():
        folder = libtpu.bundles_folder()
        assert Path(folder).is_dir() and os.environ["LIBTPU_INIT_ARGS"].startswith(before or "--xla_jf_dump_to")
    assert os.environ.get("LIBTPU_INIT_ARGS") == before and not Path(folder).exists()


@pytest.mark.skipif(not libtpu.is_installed(), reason="libtpu is not installed")
@pytest.mark.skipif(libtpu.tpu_may_be_attached(), reason="this machine may have a TPU")
def test_a_command_that_starts_jax_prints_nothing_about_tpus():
    """With JAX left to find its devices, as users have it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "TPU_", "XLA_"))}
    commands = {
        "jvgen": "from jvgen.cli.main import main; main(['config', 'show', 'configs/demo_image_vae.py']); "
        "import jax; assert jax.devices()",
        "alone": "import jax; assert jax.devices()",
    }
    errors = {}
    for name, program in commands.items():
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        errors[name] = done.stderr
    assert "TPU" in errors["alone"]  # else this test shows nothing
    assert errors["jvgen"] == ""
