"""Two processes, one device in each, encode a data set together: the files are those of one process."""

import hashlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jvgen.data.store.records import Record
from jvgen.data.store.writer import Writer
from jvgen.data.video_files import encode_video
from jvgen.interop.to_torch import export_network
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.tasks.clip_vae import ClipVAE
from tests import quick_xla

pytestmark = pytest.mark.slow

VAE = ImageVAEConfig(block_channels=(4, 8), layers_per_block=1, groups=2, mid_attention=False)


def started(root: Path, out: Path, *arguments: str) -> subprocess.Popen:
    words = ["data", "build", "latents", root / "clips", "--vae", root / "vae", "--size", "8x8", "--out", out]
    command = [sys.executable, "-m", "jvgen.cli.main", *map(str, words), *arguments]
    environment = os.environ | {"XLA_FLAGS": quick_xla.flags(), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_two_processes_make_the_files_of_one(tmp_path):
    parameters = jax.jit(ClipVAE(VAE).network.init)(jax.random.key(0))
    export_network(VAE, parameters, tmp_path / "vae")
    with Writer(tmp_path / "clips", description="") as writer:
        for number in range(6):
            pixels = np.random.default_rng(number).integers(0, 255, (3, 8, 8, 3), np.uint8)
            writer.add("validation" if number % 2 else "train", Record(
                id=str(number), kind="dynamic", clips=(encode_video(pixels, 8.0),), frames=3, height=8, width=8,
                frames_per_second=8.0,
            ))  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    one = started(tmp_path, tmp_path / "one" / "out", "--processes", "1")
    shared = ("--coordinator", address, "--processes", "2", "--process-id")
    both = [started(tmp_path, tmp_path / "two" / "out", *shared, str(number)) for number in (0, 1)]
    outputs = [process.communicate(timeout=560)[0] for process in (one, *both)]
    assert [process.returncode for process in (one, *both)] == [0, 0, 0], outputs
    assert contents(tmp_path / "one" / "out") == contents(tmp_path / "two" / "out")
    # Each split is a unit, so each process encoded one; process 0 says what was made.
    assert "6 records" in outputs[1] and all("encoding: 3/3 records" in output for output in outputs[1:])
    assert "latents have mean" in outputs[1] and "latents have mean" not in outputs[2]
