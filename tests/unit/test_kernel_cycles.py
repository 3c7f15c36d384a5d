"""Cycles of Pallas kernels from libtpu's bundles: files written by hand, and the grid of a real kernel."""

import base64
import re

import jax
import jax.numpy as jnp
import pytest

from jvgen.kernels.attention import flash_tpu, tpu
from jvgen.preflight import hlo, kernel_cycles
from jvgen.preflight.kernel_cycles import Bundles, Grid, Kernel

NAME = "splash.3"


def write(folder, name=NAME, body=400, first=120, outside=30, other=0):
    """A kernel of `outside` bundles, a region of `first` for the first step of a row, and a body with the products.

    `other` is the length of another copy of the body with as many products, behind the first; 0 for none.
    """
    lines, usage = [], ["== CAPACITY:", "4 4 3 4 2 1 3 3 1 1 2", "== UTILIZATION:"]
    end = outside + first + body
    starts = {outside: 7, outside + first: 8} | ({end: 9} if other else {})
    ends = {outside + first - 1: 7, end - 1: 8} | ({end + other - 1: 9} if other else {})
    for address in range(end + other + outside):
        regions = [f"Start region {starts[address]}"] if address in starts else []
        regions += [f"End region {ends[address]}"] if address in ends else []
        lines.append(f" {address:#x}   : > {{ %s = smov }} /* {' :: '.join(regions)} */")
        busy = 2 if outside + first <= address < end or end <= address < min(end + other, end + body) else 0
        usage.append(f"{busy} 0 0 1 0 0 0 0 0 0 0")
    (folder / f"17-{name}-00-final_hlo-static-per-bundle-utilization.txt").write_text("\n".join(usage))
    (folder / f"17-{name}-01-schedule-analysis_final_bundles.txt").write_text("")
    (folder / f"17-{name}-02-final_bundles.txt").write_text("\n".join(lines))


def kernel_bodies(function, *arrays) -> list[str]:
    """The bodies of a function's kernels as the program has them, before XLA compiles it."""
    text = jax.jit(function).trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()
    return re.findall(r"\\22body\\22: ?\\22([^\\]*)\\22", text)


def kernel_body(heads: int, rows: int) -> str:
    array = jax.ShapeDtypeStruct((2, rows, heads, 64), jnp.bfloat16)
    return kernel_bodies(lambda q, k, v: tpu.attention(q, k, v, scale=1.0), array, array, array)[0]


def test_bundles_of_a_step_and_of_a_row(tmp_path):
    write(tmp_path)
    found = kernel_cycles.count(
        str(tmp_path / f"17-{NAME}-02-final_bundles.txt"),
        str(tmp_path / f"17-{NAME}-00-final_hlo-static-per-bundle-utilization.txt"),
    )
    # Between the first and the last bundle of a region there is one less.
    assert (found.step, found.row) == (30 + 400 + 30 + 1, 119)
    assert found.use["MATMUL"] == 0.5 and found.use["VALU"] == 0.25 and found.use["XLU"] == 0


def test_of_several_copies_of_a_body_the_shortest_runs(tmp_path):
    write(tmp_path, other=600)
    files = (f"17-{NAME}-02-final_bundles.txt", f"17-{NAME}-00-final_hlo-static-per-bundle-utilization.txt")
    found = kernel_cycles.count(*(str(tmp_path / file) for file in files), copies=2)
    # What is outside of all regions, and the last bundle of each.
    assert (found.step, found.row) == (30 + 400 + 30 + 2, 119)


@pytest.mark.parametrize(
    "grid, cores, steps",
    [
        (Grid((2, 4, 3, 5), (True, True, False, False)), 1, 120),
        (Grid((2, 4, 3, 5), (True, True, False, False)), 2, 60),
        (Grid((1, 15, 3, 5), (True, True, False, False)), 2, 8 * 15),  # one core has 8 of 15 heads
        (Grid((1, 15, 3, 5), (False, False, False, False)), 2, 15 * 15),
    ],
)
def test_cores_share_a_parallel_axis(grid, cores, steps):
    assert grid.steps(cores) == steps
    assert Kernel("k", Bundles(100, 10, {}), grid).cycles(cores) == steps * 100 + steps // 5 * 10


@pytest.mark.parametrize("before", ["", '"allow_input_fusion":[],'], ids=["written by jaxlib", "written by libtpu"])
def test_kernels_of_a_program(before, tmp_path):
    """A kernel that is called twice is written once; its grid is in the program."""
    body = kernel_body(heads=3, rows=2048)
    call = 'custom-call(%p), custom_call_target="tpu_custom_call", config={"custom_call_config":{'
    call += f'{before}"body":"{body}"'
    text = f"""HloModule m

ENTRY %main.1 (p: bf16[8]) -> bf16[8] {{
  %p = bf16[8]{{0}} parameter(0)
  %{NAME} = bf16[8]{{0}} {call}}}}}
  %splash.4 = bf16[8]{{0}} {call}}}}}
  ROOT %splash.5 = bf16[16]{{0}} {call}}}}}
}}
"""
    write(tmp_path)
    found = kernel_cycles.read(hlo.parse(text), tmp_path)
    assert set(found) == {NAME, "splash.4"}
    query_block, key_block = tpu.blocks(2048, 2048, 64)
    # One axis of all heads of both batch entries, which TensorCores share.
    assert found[NAME].grid.sizes == (6, 1, 2048 // query_block, 2048 // key_block)
    assert found[NAME].grid.parallel[0] and not any(found[NAME].grid.parallel[2:])


@pytest.mark.parametrize(
    "module,most,kernels",
    [(tpu, tpu.MAX_PARTS_BYTES, 2), (tpu, 0, 3), (flash_tpu, 0, 2)],
    ids=["fused", "separate", "flash_tpu"],
)
def test_tensor_cores_share_the_heads_of_one_clip(monkeypatch, module, most, kernels):
    """In the forward kernel and in every backward kernel."""
    monkeypatch.setattr(tpu, "MAX_PARTS_BYTES", most)
    array = jax.ShapeDtypeStruct((1, 1024, 6, 64), jnp.bfloat16)

    def passes(q, k, v):
        output, pull = jax.vjp(lambda *a: module.attention(*a, scale=1.0), q, k, v)
        return output, pull(output)

    bodies = kernel_bodies(passes, array, array, array)
    grids = [kernel_cycles.grid(base64.b64decode(body)) for body in bodies]
    assert len(grids) == kernels
    assert all(grid.sizes[0] == 6 and grid.steps(2) * 2 == grid.steps(1) for grid in grids)
