"""Cycles of attention's kernels on TPUs at the shapes of calls of this library, from the programs that libtpu makes.

libtpu writes the final VLIW bundles of every Pallas kernel; a bundle is a cycle. Counted is the body of a grid step and
what surrounds it, not waiting for memory, so the numbers compare kernels of one chip and are no times. The blocks in
`jvgen.kernels.attention.flash_tpu` are the best of those that are tried here.

    python -m tests.benchmarks splash_tpu
    python -m tests.benchmarks.splash_tpu v5p clip 64 896,1792,896 splash  # one chip, call and head width
"""

import dataclasses
import os
import subprocess
import sys
from typing import Any
from unittest import mock

from tests.benchmarks.machine import Settings
from tests.benchmarks.report import Result


@dataclasses.dataclass(frozen=True)
class Call:
    """Queries, keys and keys that are not padding, head widths, and kinds of kernel that are tried."""

    queries: int
    keys: int
    valid: int
    widths: tuple[int, ...]
    kinds: tuple[str, ...]
    causal: bool = False


HEADS = 2
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
# Tokens per grid step of queries and of keys, and keys per product, at most.
BLOCKS = ("896,1792,128", "896,1792,256", "896,1792,896", "896,896,896", "1152,1792,256", "512,512,512", "512,1792,256")
# JAX's splash attention with one fused backward kernel, and that of tokamax, in blocks of 896.
OTHERS = ("splash", "tokamax", "tokamax_fixed")
BOTH = ("default", "splash")
CALLS = {
    # 49x480x720: rows of one device of 4 that share a clip.
    "clip": Call(4480, 17920, 17776, (64, 128, 256), (*BLOCKS, *BOTH, *OTHERS[1:])),
    "17x256x256": Call(1536, 1536, 1506, (64, 128), BOTH),
    "512 keys": Call(4480, 512, 512, (64, 128), BOTH),
    # 13 x 128, whose blocks have a divisor of 128 only.
    "1664 keys": Call(1792, 1664, 1664, (64,), ("896,1792,128", "default")),
    "causal": Call(768, 768, 768, (64, 128), BOTH, causal=True),
    "long causal": Call(4096, 4096, 4096, (64, 128), BOTH, causal=True),
    "VAE": Call(5400, 5400, 5400, (512,), BOTH),
}


def run(settings: Settings) -> Result:
    """Compile forward and backward kernels of each kind for each chip, call and head width."""
    chips = ("v5e",) if settings.quick else CHIPS
    calls = {"512 keys": CALLS["512 keys"]} if settings.quick else CALLS
    rows = [
        row
        for chip in chips
        for name, call in calls.items()
        for width in call.widths
        for row in _compiled(chip, name, width, call.kinds)
    ]
    best = {}
    for row in rows:
        at = row["chip"], row["call"], row["head width"]
        if row["kind"][0].isdigit() and "problem" not in row:
            best[at] = min(best.get(at, row), row, key=lambda row: row["forward"] + row["backward"])
    return Result(
        title="VLIW bundles per million scores of one TensorCore, forward and backward",
        settings={name: f"{call.queries} x {call.keys}, {call.valid} valid" for name, call in calls.items()},
        rows=rows,
        shown=("chip", "call", "head width", "kind", "forward", "at_most", "backward", "temporary_MiB", "problem"),
        notes=(
            "kind: tokens per grid step of queries and of keys, and keys per product; or another library's kernel",
            "at_most: forward, with a running maximum and a mask in every block",
            *(f"best blocks on {at[0]}, {at[1]}, heads of {at[2]}: {row['kind']}" for at, row in best.items()),
        ),
    )


def _compiled(chip: str, call: str, width: int, kinds: tuple[str, ...]) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.benchmarks.splash_tpu", chip, call, str(width), *kinds]
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    found = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    died = (done.stderr.strip().splitlines() or ["failed"])[-1]
    rows = []
    for kind in kinds:
        numbers, _, problem = found.get(kind, f"| {died}").partition("|")
        words = (word.split("=") for word in numbers.split())
        row = {"chip": chip, "call": call, "head width": width, "kind": kind}
        rows.append(row | ({"problem": problem.strip()[:60]} if problem else {name: int(v) for name, v in words}))
    return rows


def _compile(chip: str, call: str, width: str, *kinds: str) -> None:
    """In the child process: compile each kind, and print its bundles per million scores."""
    from jvgen.parallel import libtpu

    with libtpu.writing_bundles():
        for kind in kinds:
            try:
                print(kind, _numbers(chip, CALLS[call], int(width), kind), flush=True)
            except Exception as error:
                print(kind, "|", f"{type(error).__name__}: {error}".splitlines()[0], flush=True)


def _numbers(chip: str, call: Call, width: int, kind: str) -> str:
    import jax
    import jax.numpy as jnp

    from jvgen.kernels.attention import flash_tpu
    from jvgen.parallel import libtpu
    from jvgen.preflight import hlo, kernel_cycles, topology

    place = jax.sharding.SingleDeviceSharding(topology.describe(CHIPS[chip]).devices[0])
    attend = _other(kind) if kind in OTHERS else flash_tpu.attention
    largest = tuple(map(int, kind.split(","))) if kind[0].isdigit() else flash_tpu.largest_blocks(width)

    def tokens(length: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, length, HEADS, width), jnp.bfloat16, sharding=place)

    options = {"scale": width**-0.5, "valid_length": call.valid, "causal": call.causal}

    def both(query: jax.Array, key: jax.Array, value: jax.Array, gradient: jax.Array) -> tuple:
        output, pull = jax.vjp(lambda *a: attend(*a, **options), query, key, value)
        return output, pull(gradient)

    queries, keys = tokens(call.queries), tokens(call.keys)
    with mock.patch.object(flash_tpu, "largest_blocks", lambda _: largest):
        compiled = jax.jit(both).lower(queries, keys, keys, queries).compile()
    kernels = kernel_cycles.read(hlo.parse(compiled.as_text()), libtpu.bundles_folder())
    per_million = 1e6 / (HEADS * call.queries * call.keys)
    cycles = {name: kernel.cycles(1) * per_million for name, kernel in kernels.items()}
    forward = [name for name in cycles if "fwd" in name or "forward" in name]
    found = {
        "forward": sum(cycles[name] for name in forward),
        "at_most": sum(kernels[name].cycles(1, longest=True) * per_million for name in forward),
        "backward": sum(cycles.values()) - sum(cycles[name] for name in forward),
        "temporary_MiB": compiled.memory_analysis().temp_size_in_bytes >> 20,
    }
    return " ".join(f"{name}={value:.0f}" for name, value in found.items())


def _other(kind: str) -> Any:
    """Another library's kernel with the arguments of `flash_tpu.attention`."""
    import functools

    from jvgen.kernels.attention import tokamax_splash, tpu

    if kind == "splash":
        return tpu.attention
    return functools.partial(tokamax_splash.attention, fixed_maximum=kind.endswith("fixed"))


if __name__ == "__main__":
    _compile(*sys.argv[1:])
