"""Cycles of attention's kernels on TPUs at RepVideo-2B's shapes (49x480x720), from the programs that libtpu makes.

libtpu writes the final VLIW bundles of every Pallas kernel; a bundle is a cycle. Counted is the body of a grid step and
what surrounds it, not waiting for memory, so the numbers compare kernels of one chip and are no times. The blocks in
`jvgen.kernels.attention.flash_tpu` are the best of those that are tried here.
"""

import os
import subprocess
import sys
from typing import Any

from tests.benchmarks.machine import Settings
from tests.benchmarks.report import Result

# Rows of one device of 4 that share a clip, all keys, keys that are not padding, heads.
QUERIES, KEYS, VALID, HEADS = 4480, 17920, 17776, 2
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
WIDTHS = (64, 128)
# Tokens per grid step of queries and of keys, and keys per product.
BLOCKS = ((896, 1792, 128), (896, 1792, 256), (896, 1792, 896), (896, 896, 896), (640, 1792, 256), (1152, 1792, 128))
# JAX's splash attention with one fused backward kernel, and that of tokamax, in blocks of 896.
OTHERS = ("splash", "tokamax", "tokamax_fixed")


def run(settings: Settings) -> Result:
    """Compile forward and backward kernels of each kind for each chip and head width."""
    chips, widths = (("v5e",), (64,)) if settings.quick else (CHIPS, WIDTHS)
    kinds = ["896,1792,256"] if settings.quick else [*(",".join(map(str, blocks)) for blocks in BLOCKS), *OTHERS]
    rows = [row for chip in chips for row in _compiled(chip, widths, kinds)]
    best = {}
    for row in rows:
        at = row["chip"], row["head width"]
        if row["kind"][0].isdigit() and "problem" not in row:
            best[at] = min(best.get(at, row), row, key=lambda row: row["forward"] + row["backward"])
    return Result(
        title="VLIW bundles per million scores of one TensorCore, forward and backward",
        settings={"queries": QUERIES, "keys": KEYS, "valid": VALID},
        rows=rows,
        shown=("chip", "head width", "kind", "forward", "backward", "temporary_MiB", "problem"),
        notes=(
            "kind: tokens per grid step of queries and of keys, and keys per product; or another library's kernel",
            *(f"best blocks on {chip} for heads of {width}: {row['kind']}" for (chip, width), row in best.items()),
        ),
    )


def _compiled(chip: str, widths: tuple[int, ...], kinds: list[str]) -> list[dict[str, Any]]:
    rows = []
    for width in widths:
        command = [sys.executable, "-m", "tests.benchmarks.splash_tpu", chip, str(width), *kinds]
        done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
        found = dict(line.split(" ", 1) for line in done.stdout.splitlines())
        died = (done.stderr.strip().splitlines() or ["failed"])[-1]
        for kind in kinds:
            numbers, _, problem = found.get(kind, f"| {died}").partition("|")
            words = (word.split("=") for word in numbers.split())
            row = {"chip": chip, "head width": width, "kind": kind, "problem": problem.strip()[:60] or None}
            rows.append(row | {name: int(value) for name, value in words})
            row = rows[-1]
            if row["problem"] is None:
                del row["problem"]
    return rows


def _compile(chip: str, width: str, *kinds: str) -> None:
    """In the child process: compile each kind, and print its bundles per million scores."""
    from jvgen.parallel import libtpu

    with libtpu.writing_bundles():
        for kind in kinds:
            try:
                print(kind, _numbers(chip, int(width), kind), flush=True)
            except Exception as error:
                print(kind, "|", f"{type(error).__name__}: {error}".splitlines()[0], flush=True)


def _numbers(chip: str, width: int, kind: str) -> str:
    import jax
    import jax.numpy as jnp

    from jvgen.kernels.attention import flash_tpu
    from jvgen.parallel import libtpu
    from jvgen.preflight import hlo, kernel_cycles, topology

    place = jax.sharding.SingleDeviceSharding(topology.describe(CHIPS[chip]).devices[0])
    attend = _other(kind) if kind in OTHERS else flash_tpu.attention
    if kind not in OTHERS:
        flash_tpu.DEFAULT_BLOCKS = tuple(map(int, kind.split(",")))

    def tokens(length: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, length, HEADS, width), jnp.bfloat16, sharding=place)

    def both(query: jax.Array, key: jax.Array, value: jax.Array, gradient: jax.Array) -> tuple:
        output, pull = jax.vjp(lambda *a: attend(*a, scale=width**-0.5, valid_length=VALID), query, key, value)
        return output, pull(gradient)

    compiled = jax.jit(both).lower(tokens(QUERIES), tokens(KEYS), tokens(KEYS), tokens(QUERIES)).compile()
    kernels = kernel_cycles.read(hlo.parse(compiled.as_text()), libtpu.bundles_folder())
    per_million = 1e6 / (HEADS * QUERIES * KEYS)
    cycles = {name: kernel.cycles(1) * per_million for name, kernel in kernels.items()}
    forward = sum(value for name, value in cycles.items() if "fwd" in name or "forward" in name)
    temporary = compiled.memory_analysis().temp_size_in_bytes >> 20
    return f"forward={forward:.0f} backward={sum(cycles.values()) - forward:.0f} temporary_MiB={temporary}"


def _other(kind: str) -> Any:
    """Another library's kernel with the arguments of `flash_tpu.attention`."""
    import functools

    from jvgen.kernels.attention import tokamax_splash, tpu

    if kind == "splash":
        return tpu.attention
    return functools.partial(tokamax_splash.attention, fixed_maximum=kind.endswith("fixed"))


if __name__ == "__main__":
    _compile(*sys.argv[1:])
