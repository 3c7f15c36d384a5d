"""Flags of XLA and libtpu: known to the versions installed here, and asynchronous collectives by them."""

import importlib.util
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jvgen.launch.flags import PRESETS, flags_of
from jvgen.launch.machines import GPUS, TPUS
from jvgen.parallel.chips import chip_named

LIBTPU = importlib.util.find_spec("libtpu")
needs_libtpu = pytest.mark.skipif(LIBTPU is None, reason="libtpu is not installed")

# A scan over layers whose parameters are gathered, and its gradient; prints how many asynchronous operations the
# executable names. Its text cannot be read: jaxlib 0.10.2 does not know libtpu's asynchronous operations.
PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jvgen.preflight.topology import describe

mesh = Mesh(np.asarray(describe(sys.argv[1]).devices), ("a",))
place = lambda *spec: NamedSharding(mesh, P(*spec))

def loss(x, layers):
    def layer(x, w):
        return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, place())), None
    return jnp.sum(jax.lax.scan(layer, x, layers)[0].astype(jnp.float32))

weights = place(None, "a", None)
shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.bfloat16)
step = jax.jit(jax.grad(loss, argnums=1), in_shardings=(place("a", None), weights), out_shardings=weights)
compiled = step.lower(shape(2048, 2048), shape(4, 2048, 2048)).compile()
print(compiled.runtime_executable().serialize().count(b"async-start"))
"""


def run(program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=clean | {"JAX_PLATFORMS": "cpu"} | environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def text(chip: str) -> str:
    return " ".join(map(str, flags_of(chip_named(chip))))


def test_every_flag_has_a_reason_and_every_chip_is_known():
    assert set(PRESETS) <= set(TPUS) | set(GPUS)
    for chip, flags in PRESETS.items():
        assert len({flag.name for flag in flags}) == len(flags), chip
        assert all(len(flag.reason.split()) > 5 and flag.name.startswith("xla_") for flag in flags), chip


@needs_libtpu
def test_libtpu_has_the_flags():
    with (Path(LIBTPU.origin).parent / "libtpu.so").open("rb") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as library:
            for name in {flag.name for chip in TPUS for flag in flags_of(chip_named(chip))}:
                assert library.find(b"\0" + name.encode() + b"\0") >= 0, name


def test_jaxlib_has_the_flags():
    """XLA ends a process whose flags it does not know, on a CPU too."""
    start = "import jax; jax.devices()"
    for flags in {text(chip) for chip in GPUS}:
        done = run(start, XLA_FLAGS=flags)
        assert done.returncode == 0, done.stderr
    done = run(start, XLA_FLAGS="--xla_gpu_enable_pipelined_all_scatter=true")
    assert done.returncode != 0 and "Unknown flag" in done.stderr


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("chip, topology", [("v5p", "v5p:2x2x2"), ("v6e", "v6e:2x4")])
def test_collectives_become_asynchronous(chip, topology):
    default, preset = run(PROGRAM, topology), run(PROGRAM, topology, LIBTPU_INIT_ARGS=text(chip))
    assert default.returncode == 0 and preset.returncode == 0, default.stderr + preset.stderr
    assert int(default.stdout) == 0 and int(preset.stdout) > 0


@needs_libtpu
@pytest.mark.slow
def test_libtpu_notices_an_unknown_flag():
    done = run(PROGRAM, "v5p:2x2x1", LIBTPU_INIT_ARGS="--xla_tpu_no_such_flag=true")
    assert done.returncode != 0 and "Unknown command line flag 'xla_tpu_no_such_flag'" in done.stdout + done.stderr
