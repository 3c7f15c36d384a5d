"""Rematerialization, counted: operations of the traced or compiled program, without an accelerator."""

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo  # what asks the GPU; there is none here

from jvgen.nn import attention as dispatcher
from jvgen.nn.attention import attention
from jvgen.nn.linear import Linear
from jvgen.nn.stacked import CUDNN_ATTENTION, Remat, Stacked, checkpointed, run_block
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


@pytest.fixture
def cuda(monkeypatch):
    """Programs are traced as for an H100 with cuDNN 9.11; they cannot run."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91100)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(fused_attention_stablehlo, "is_cuda_compute_capability_equal", lambda _: False)
    monkeypatch.setattr(dispatcher.axes, "platform", lambda: "gpu")


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


@pytest.mark.parametrize("mesh", [None, MeshConfig(fsdp=2)], ids=["one_device", "mesh"])
@pytest.mark.parametrize(
    ("remat", "forward"), [(Remat.NONE, 2), (Remat.SAVE_ATTENTION, 2), (Remat.SAVE_MATMULS, 2), (Remat.FULL, 4)]
)
def test_cudnn_attention_is_computed_once(cuda, remat, forward, mesh):
    """Under FULL twice, as everything is."""
    partitioner = None if mesh is None else Sharding(make_mesh(mesh, jax.devices()[:2]))

    def layer(x):
        return jnp.tanh(x) + attention(x * 1.5, x, x * 2)

    def loss(x):
        with axes.partitioned(partitioner):
            for _ in range(2):
                x = checkpointed(layer, remat, in_scan=False)(x)
        return jnp.sum(x.astype(jnp.float32))

    traced = jax.make_jaxpr(jax.grad(loss))(jnp.ones((2, 64, 2, 64), jnp.bfloat16))
    counts = count_primitives(traced.jaxpr)
    found = {name: count for name, count in counts.items() if "dot_product_attention" in name}
    assert found == {f"{CUDNN_ATTENTION}_wrapper": forward, "dot_product_attention_bwd_wrapper": 2}
