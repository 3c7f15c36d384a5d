"""Products in 8 bits by the optional package qwix, where it is installed: which layers, how close, what is refused."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jvgen import nested
from jvgen.config import ConfigError
from jvgen.nn import quantized
from jvgen.nn.linear import Linear
from jvgen.nn.network import Network
from jvgen.nn.stacked import Remat, Stacked
from jvgen.parallel.axes import CONDITION, EMBED, HEADS, LAYERS, MLP, VOCABULARY

installed = pytest.mark.skipif(
    importlib.util.find_spec("qwix") is None, reason="the optional package qwix is not installed"
)
WIDTH = 64


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = Linear(WIDTH, 4 * WIDTH, axes=(EMBED, MLP), rngs=rngs)
        self.down = Linear(4 * WIDTH, WIDTH, axes=(MLP, EMBED), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(jax.nn.gelu(self.up(x)))


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.blocks = Stacked(lambda r: Block(r), 2, rngs=rngs)
        self.out = Linear(WIDTH, WIDTH, axes=(EMBED, MLP), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(self.blocks.scan(lambda block, carry, _: block(carry), x, remat=Remat.FULL))


@pytest.fixture(scope="module")
def model():
    network = Network.of(lambda rngs: Model(rngs))
    parameters = jax.tree.map(lambda p: 5 * p, network.init(jax.random.key(0)))
    return network, parameters, jax.random.normal(jax.random.key(1), (2, 16, WIDTH), jnp.bfloat16)


def gradient(network, parameters, x, kind):
    def loss(parameters):
        return jnp.mean(jnp.square(network.apply(parameters, x).astype(jnp.float32)))

    with quantized.products(kind):
        return jax.make_jaxpr(jax.grad(loss))(parameters), jax.jit(jax.value_and_grad(loss))(parameters)


@installed
@pytest.mark.parametrize("kind,dtype,error", [("int8", "i8", 0.05), ("fp8", "f8_e4m3fn", 0.15)])
def test_blocks_are_quantized_forward_and_backward_and_nothing_else(model, kind, dtype, error):
    network, parameters, x = model
    exact_program, (exact, exact_gradient) = gradient(network, parameters, x, "none")
    program, (value, found) = gradient(network, parameters, x, kind)
    assert f":{dtype}[" not in str(exact_program)
    products = [line for line in str(program).splitlines() if "dot_general" in line]
    # Of each of the two products: forward, again for the gradient, and two of the gradient; the last layer in bfloat16.
    assert f":{dtype}[" in str(program) and sum(":bf16[" in line for line in products) >= 2
    np.testing.assert_allclose(value, exact, rtol=error)
    want = nested.flatten(exact_gradient)
    for path, leaf in nested.flatten(found).items():
        assert leaf.dtype == jnp.float32
        off = np.linalg.norm(leaf - want[path]) / np.linalg.norm(want[path])
        assert 0 < off < error, (path, off)


@installed
def test_networks_that_are_not_trained_are_not_quantized(model):
    network, parameters, x = Network.of(lambda rngs: Model(rngs)), *model[1:]
    network.freeze()
    assert ":i8[" not in str(gradient(network, parameters, x, "int8")[0])


def test_which_kernels_are_those_of_blocks(monkeypatch):
    monkeypatch.setattr(quantized, "_qwix", lambda: None)
    assert quantized.kind_for((LAYERS, EMBED, HEADS), frozen=False) == "none"
    with quantized.products("int8"):
        for names in ((LAYERS, EMBED, HEADS), (LAYERS, MLP, EMBED)):
            assert quantized.kind_for(names, frozen=False) == "int8"
            assert quantized.kind_for(names, frozen=True) == "none"
        for names in ((EMBED, MLP), (LAYERS, CONDITION, EMBED), (VOCABULARY, EMBED), (LAYERS, None, EMBED)):
            assert quantized.kind_for(names, frozen=False) == "none"


def test_without_the_package_it_is_an_error_that_says_what_to_do(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(quantized.importlib.metadata, "version", missing)
    with (
        pytest.raises(ConfigError, match=r"qwix is not installed; install jvgen\[quantized\]"),
        quantized.products("int8"),
    ):
        pass
    monkeypatch.setattr(quantized.importlib.metadata, "version", lambda name: "9.9")
    monkeypatch.setattr(quantized, "_MODULE", "jvgen.moved")
    with (
        pytest.raises(ConfigError, match=r"qwix 9.9 has no quantized product where version 0.1.8 has it"),
        quantized.products("fp8"),
    ):
        pass
    with pytest.raises(ConfigError, match=r"qwix 9.9 has no"):
        quantized.check_installed("int8")
    # No package is needed for none.
    quantized.check_installed("none")
    with quantized.products("none"):
        pass
