"""Rematerialization, counted: operations of the traced or compiled program, without an accelerator."""

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jvgen.geometry.epipolar import Band
from jvgen.kernels.attention import gpu
from jvgen.nn.attention import attention
from jvgen.nn.epipolar_attention import epipolar_attention
from jvgen.nn.linear import Linear
from jvgen.nn.stacked import Remat, Stacked, checkpointed, run_block
from jvgen.parallel import axes
from jvgen.parallel.axes import EMBED
from jvgen.parallel.mesh import MeshConfig, make_mesh
from jvgen.parallel.rules import Sharding
from jvgen.preflight import topology

WIDTH, ROWS = 256, 2048


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([Linear(WIDTH, WIDTH, axes=(EMBED, EMBED), rngs=rngs) for _ in range(2)])

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = x
        for layer in self.layers:
            hidden = jnp.tanh(layer(hidden))
        return x + hidden


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])

    def __call__(self, x: jax.Array, remat: Remat) -> jax.Array:
        for block in self.blocks:
            x = run_block(block, remat, x)
        return x


class StackedNetwork(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.blocks = Stacked(Block, 2, rngs=rngs)

    def __call__(self, x: jax.Array, remat: Remat) -> jax.Array:
        return self.blocks.scan(lambda block, x, _: block(x), x, remat=remat, unroll=True)


@pytest.mark.parametrize("network", [Network, StackedNetwork], ids=["run_block", "unrolled"])
def test_blocks_outside_of_a_scan_are_fenced(network):
    """XLA could find the second computation equal to the first, and store its results as without remat."""
    graph, state = nnx.split(nnx.eval_shape(lambda: network(nnx.Rngs(0))))
    x = jax.ShapeDtypeStruct((8, WIDTH), jnp.float32)
    fences = {}
    for remat in (Remat.NONE, Remat.FULL):
        loss = jax.grad(lambda state, x, remat=remat: jnp.sum(nnx.merge(graph, state)(x, remat) ** 2))
        fences[remat] = jax.jit(loss).lower(state, x).as_text().count("stablehlo.optimization_barrier")
    assert fences == {Remat.NONE: 0, Remat.FULL: 2}


@pytest.mark.slow
@pytest.mark.parametrize("network", [Network, StackedNetwork], ids=["run_block", "unrolled"])
@pytest.mark.skipif(not topology.has_compiler(), reason="the package libtpu is not installed")
def test_blocks_outside_of_a_scan_are_computed_again_on_a_tpu(network):
    device = topology.describe("v5e:2x2").devices[0]
    graph, state = nnx.split(nnx.eval_shape(lambda: network(nnx.Rngs(0))))
    place = jax.sharding.SingleDeviceSharding(device)
    state, x = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        (state, jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)),
    )
    found = {}
    for remat in (Remat.NONE, Remat.FULL):
        loss = jax.grad(lambda state, x, remat=remat: jnp.sum(nnx.merge(graph, state)(x, remat) ** 2))
        found[remat] = jax.jit(loss).lower(state, x).compile().cost_analysis()["flops"]
    assert found[Remat.FULL] > 1.2 * found[Remat.NONE]


def count_primitives(jaxpr: Any) -> Counter:
    """Primitives by name in a jaxpr and all that it calls."""
    found: Counter = Counter()
    for equation in jaxpr.eqns:
        found[equation.primitive.name] += 1
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found += count_primitives(inner)
    return found


def along_lines(query, key, value):
    """Epipolar attention of odd lengths, which are padded for cuDNN."""
    lines = jnp.ones((query.shape[0], query.shape[1], 3)) * jnp.asarray([0.6, 0.8, -1.0])
    points = jnp.ones((key.shape[1], 3))
    return epipolar_attention(query, key, value, Band(lines, points, jnp.ones(2), jnp.ones(2)))


@pytest.mark.parametrize("mesh", [None, MeshConfig(fsdp=2)], ids=["one_device", "mesh"])
@pytest.mark.parametrize(
    ("remat", "forward"), [(Remat.NONE, 2), (Remat.SAVE_ATTENTION, 2), (Remat.SAVE_MATMULS, 2), (Remat.FULL, 4)]
)
@pytest.mark.parametrize("attend", [attention, along_lines])
def test_cudnn_attention_is_computed_once(cuda, attend, remat, forward, mesh):
    """Under FULL twice, as everything is."""
    partitioner = None if mesh is None else Sharding(make_mesh(mesh, jax.devices()[:2]))

    def layer(x):
        return jnp.tanh(x) + attend(x * 1.5, x, x * 2)

    def loss(x):
        with axes.partitioned(partitioner):
            for _ in range(2):
                x = checkpointed(layer, remat, in_scan=False)(x)
        return jnp.sum(x.astype(jnp.float32))

    traced = jax.make_jaxpr(jax.grad(loss))(jnp.ones((2, 63, 2, 64), jnp.bfloat16))
    counts = count_primitives(traced.jaxpr)
    found = {name: count for name, count in counts.items() if "dot_product_attention" in name}
    assert found == {f"{gpu.FORWARD}_wrapper": forward, "dot_product_attention_bwd_wrapper": 2}


@pytest.mark.parametrize("attend", [attention, along_lines])
def test_cudnn_attention_lowers_to_its_kernels(cuda, attend):
    """What XLA gets for CUDA: cuDNN's calls, and nowhere the scores of all heads."""
    x = jax.ShapeDtypeStruct((2, 63, 2, 32), jnp.bfloat16)
    grad = jax.grad(lambda *arrays: jnp.sum(attend(*arrays).astype(jnp.float32)), argnums=(0, 1, 2))
    text = jax.jit(grad).trace(x, x, x).lower(lowering_platforms=("cuda",)).as_text()
    call = "__cudnn$fmhaScaleBiasSoftmax" if attend is along_lines else "__cudnn$fmhaSoftmax"
    assert f"@{call}(" in text and f"@{call}Backward(" in text
    assert "2x2x63x63x" not in text and "2x2x64x64x" not in text
