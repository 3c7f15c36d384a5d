"""A small transformer on eight host devices: every mesh gives the losses and gradients of one device."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jvgen.nn.attention import AttentionKernel, attention
from jvgen.nn.linear import Linear
from jvgen.nn.network import Network
from jvgen.nn.norm import LayerNorm
from jvgen.nn.stacked import Remat, Stacked
from jvgen.parallel import axes
from jvgen.parallel.mesh import MeshConfig, make_mesh
from jvgen.parallel.rules import Sharding, ShardingConfig

BATCH, LENGTH, VALID, WIDTH, HEADS = 8, 64, 50, 32, 4
MESHES = {
    "data": {"data": 8, "fsdp": 1},
    "fsdp": {"fsdp": 8},
    "seq": {"fsdp": 1, "seq": 8},
    "tensor": {"data": 2, "fsdp": 1, "tensor": 4},
    "data-fsdp-seq": {"data": 2, "fsdp": 2, "seq": 2},
    "fsdp-seq-tensor": {"fsdp": 2, "seq": 2, "tensor": 2},
    "data-seq-tensor": {"data": 2, "fsdp": 1, "seq": 2, "tensor": 2},
}


class Block(nnx.Module):
    def __init__(self, kernel: AttentionKernel, *, rngs: nnx.Rngs):
        self.kernel = kernel
        self.norm = LayerNorm(WIDTH, epsilon=1e-6, axis=axes.EMBED)
        names = (axes.EMBED, axes.HEADS)
        self.query, self.key, self.value = (Linear(WIDTH, WIDTH, axes=names, rngs=rngs) for _ in range(3))
        self.output = Linear(WIDTH, WIDTH, axes=names[::-1], rngs=rngs)
        self.up = Linear(WIDTH, 4 * WIDTH, axes=(axes.EMBED, axes.MLP), rngs=rngs)
        self.down = Linear(4 * WIDTH, WIDTH, axes=(axes.MLP, axes.EMBED), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        normed = self.norm(x)
        heads = (*x.shape[:2], HEADS, WIDTH // HEADS)
        query, key, value = (layer(normed).reshape(heads) for layer in (self.query, self.key, self.value))
        mixed = attention(query, key, value, valid_length=VALID, kernel=self.kernel).reshape(x.shape)
        x = axes.constrain(x + self.output(mixed), axes.BATCH, axes.LENGTH, axes.ACTIVATION_EMBED)
        hidden = axes.constrain(jax.nn.gelu(self.up(x)), axes.BATCH, axes.LENGTH, axes.ACTIVATION_MLP)
        return axes.constrain(x + self.down(hidden), axes.BATCH, axes.LENGTH, axes.ACTIVATION_EMBED)


class Transformer(nnx.Module):
    def __init__(self, kernel: AttentionKernel, *, rngs: nnx.Rngs):
        self.blocks = Stacked(lambda r: Block(kernel, rngs=r), 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.blocks.scan(lambda block, carry, _: block(carry), x, remat=Remat.SAVE_ATTENTION)


class Case:
    """One network, its inputs, and the step on a mesh or on one device."""

    def __init__(self, kernel: AttentionKernel):
        self.network = Network.of(lambda rngs: Transformer(kernel, rngs=rngs))
        self.parameters = jax.tree.map(lambda p: p * 3, self.network.init(jax.random.key(0)))
        self.x, self.target = jax.random.normal(jax.random.key(1), (2, BATCH, LENGTH, WIDTH))

    def loss(self, parameters, x, target, sharding=None):
        with axes.partitioned(sharding):
            error = self.network.apply(parameters, x) - target
        return jnp.mean(jnp.square(error)[:, :VALID])

    def compiled(self, sharding):
        storage = sharding.storage(self.network.axes, self.network.shapes)
        batch = sharding.batch(self.x)
        step = jax.jit(
            jax.value_and_grad(lambda *a: self.loss(*a, sharding=sharding)),
            in_shardings=(storage, batch, batch),
            out_shardings=(sharding.replicated, storage),
        )
        return step.lower(self.network.shapes, self.x, self.target).compile(), storage

    def on(self, sharding):
        step, storage = self.compiled(sharding)
        x, target = jax.device_put((self.x, self.target), sharding.batch(self.x))
        return step(jax.device_put(self.parameters, storage), x, target)


@pytest.fixture(scope="module", params=["cpu", "chunked", "reference"])
def case(request):
    case = Case(AttentionKernel(request.param))
    case.kernel = request.param
    case.expected = jax.jit(jax.value_and_grad(case.loss))(case.parameters, case.x, case.target)
    return case


def sharding_of(mesh):
    return Sharding(make_mesh(MeshConfig(**mesh)), ShardingConfig(replicate_below=0))


def assert_same(actual, expected):
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected[1]))
    for got, want in zip(jax.tree.leaves(actual[1]), jax.tree.leaves(expected[1]), strict=True):
        # The gradient of the key's bias is zero but for rounding, so there is a floor.
        atol = max(1e-5 * float(jnp.abs(want).max()), 5e-7 * largest)
        np.testing.assert_allclose(got, want, rtol=0, atol=atol)


@pytest.mark.parametrize("mesh", MESHES)
def test_losses_and_gradients_are_those_of_one_device(case, mesh):
    if case.kernel != "cpu" and mesh != "fsdp-seq-tensor":
        pytest.skip("the other kernels differ only in what runs on a device")
    sharding = sharding_of(MESHES[mesh])
    loss, gradients = case.on(sharding)
    assert_same((loss, gradients), case.expected)
    storage = sharding.storage(case.network.axes, case.network.shapes)
    for gradient, place in zip(jax.tree.leaves(gradients), jax.tree.leaves(storage), strict=True):
        assert gradient.sharding.is_equivalent_to(place, gradient.ndim)


def shapes_in(program: str) -> set[tuple[int, ...]]:
    return {tuple(int(n) for n in found.split(",")) for found in re.findall(r"f32\[([\d,]+)\]", program)}


def test_seq_shards_tokens():
    """With seq = 8 a device never holds the scores, or the hidden units, of more than an eighth of the tokens."""
    case = Case(AttentionKernel.CPU)
    program = case.compiled(sharding_of({"fsdp": 1, "seq": 8}))[0].as_text()
    shapes = shapes_in(program)
    local = LENGTH // 8
    assert (BATCH, local, 4 * WIDTH) in shapes or (BATCH * local, 4 * WIDTH) in shapes
    assert (BATCH, LENGTH, 4 * WIDTH) not in shapes and (BATCH * LENGTH, 4 * WIDTH) not in shapes
    assert (local, VALID) in shapes and (LENGTH, VALID) not in shapes
    assert "all-gather" in program


def test_tensor_shards_heads_and_hidden_units():
    case = Case(AttentionKernel.CPU)
    shapes = shapes_in(case.compiled(sharding_of({"data": 2, "fsdp": 1, "tensor": 4}))[0].as_text())
    assert any(shape[-1] == WIDTH for shape in shapes)
    assert not any(4 * WIDTH == shape[-1] for shape in shapes if len(shape) > 1)
    assert any(WIDTH // HEADS == shape[-1] for shape in shapes)


def test_fsdp_gathers_one_layer_at_a_time():
    """No array has the whole of the stacked kernels; single layers are gathered whole."""
    case = Case(AttentionKernel.CPU)
    shapes = shapes_in(case.compiled(sharding_of({"fsdp": 8}))[0].as_text())
    assert (3, WIDTH, 4 * WIDTH) not in shapes and (3, WIDTH, WIDTH) not in shapes
    assert (3, WIDTH // 8, 4 * WIDTH) in shapes
    assert {(WIDTH, 4 * WIDTH), (1, WIDTH, 4 * WIDTH)} & shapes
