"""Cycles of splash attention's kernels at RepVideo-2B's shapes (49x480x720), from the programs that libtpu makes.

libtpu writes the final VLIW bundles of every Pallas kernel; a bundle is a cycle. Counted is the body of a grid step and
what surrounds it, not waiting for memory, so the numbers compare kernels of one chip and are no times.
"""

import glob
import os
import re
import subprocess
import sys
import tempfile
from typing import Any

from jvgen.preflight import kernel_cycles
from tests.benchmarks.machine import Settings
from tests.benchmarks.report import Result

# Rows of one device of 4 that share a clip, all keys, keys that are not padding, heads, head width.
QUERIES, KEYS, VALID, HEADS, WIDTH = 4480, 17920, 17776, 2, 64
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
KINDS = ("separate", "fused", "tokamax", "tokamax_fixed")
PASSES = "(final_bundles|final_hlo-static-per-bundle-utilization)"


def run(settings: Settings) -> Result:
    """Compile forward and backward kernels of each kind for each chip, each in a process of its own."""
    chips = {"v5e": CHIPS["v5e"]} if settings.quick else CHIPS
    rows = []
    for chip in chips:
        for kind in ("fused",) if settings.quick else KINDS:
            with tempfile.TemporaryDirectory() as folder:
                found = _compiled(chip, kind, folder)
            rows.append({"chip": chip, "kind": kind, **found})
    return Result(
        title="VLIW bundles per million scores, forward and backward",
        settings={"queries": QUERIES, "keys": KEYS, "valid": VALID, "head width": WIDTH},
        rows=rows,
        notes=(
            "separate: a kernel for the queries' gradient and one for that of keys and values; fused: one for all.",
        ),
    )


def _compiled(chip: str, kind: str, folder: str) -> dict[str, Any]:
    flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex={PASSES}"
    environment = os.environ | {"LIBTPU_INIT_ARGS": flags, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    command = [sys.executable, "-m", "tests.benchmarks.splash_tpu", chip, kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"problem": (done.stderr.strip().splitlines() or ["failed"])[-1][:100]}
    sizes = dict(word.split("=") for word in done.stdout.split())
    cycles = {
        name: _bundles(folder, f"splash_mh?_{name}", 2 if kind.startswith("tokamax") else 1)
        for name in ("fwd", "dq", "dkv")
        if glob.glob(f"{folder}/*splash_mh?_{name}*final_bundles.txt")
    }
    steps = {"fwd": int(sizes["fwd"]), "dq": int(sizes["fwd"]), "dkv": int(sizes["dkv"])}
    forward = cycles["fwd"] / steps["fwd"] * 1e6
    backward = sum(cycles[name] / steps[name] * 1e6 for name in ("dq", "dkv") if name in cycles)
    return {"forward": round(forward), "backward": round(backward), "temporary_MiB": int(sizes["temporary"]) >> 20}


def _bundles(folder: str, pattern: str, copies: int) -> int:
    """Bundles of one grid step. tokamax has two copies of the body, of which the one without mask runs for most."""
    file = next(f for f in glob.glob(f"{folder}/*{pattern}*final_bundles.txt") if "schedule-analysis" not in f)
    usage = glob.glob(re.sub(r"-\d\d-final_bundles.txt$", "", file) + "*utilization.txt")[0]
    return kernel_cycles.count(file, usage, copies).step


def _compile(chip: str, kind: str) -> None:
    """In the child process: compile, and print the scores of a grid step and the bytes of temporaries."""
    import jax
    import jax.numpy as jnp

    from jvgen.kernels.attention import tokamax_splash, tpu
    from jvgen.preflight import topology

    tpu.MAX_PARTS_BYTES = 0 if kind == "separate" else 2**40
    place = jax.sharding.SingleDeviceSharding(topology.describe(CHIPS[chip]).devices[0])

    def tokens(length: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, length, HEADS, WIDTH), jnp.bfloat16, sharding=place)

    def attend(*arrays: jax.Array) -> jax.Array:
        options = {"scale": WIDTH**-0.5, "valid_length": VALID}
        if kind.startswith("tokamax"):
            return tokamax_splash.attention(*arrays, **options, fixed_maximum=kind.endswith("fixed"))
        return tpu.attention(*arrays, **options)

    def both(query: jax.Array, key: jax.Array, value: jax.Array, gradient: jax.Array) -> tuple:
        output, pull = jax.vjp(attend, query, key, value)
        return output, pull(gradient)

    compiled = jax.jit(both).lower(tokens(QUERIES), tokens(KEYS), tokens(KEYS), tokens(QUERIES)).compile()
    query_block, key_block = tpu.blocks(QUERIES, KEYS, WIDTH)
    step = key_block
    if not kind.startswith("tokamax"):
        sizes = tpu.block_sizes((1, HEADS, QUERIES, WIDTH), KEYS, jnp.bfloat16, query_block, key_block)
        step = sizes.block_kv_dkv
    temporary = compiled.memory_analysis().temp_size_in_bytes
    print(f"fwd={query_block * key_block} dkv={query_block * step} temporary={temporary}")


if __name__ == "__main__":
    _compile(*sys.argv[1:])
