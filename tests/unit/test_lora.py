"""LoRA of linear layers: beside the kernels or merged into them, dropout, several at once, which layers get one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jvgen import nested
from jvgen.config import ConfigError
from jvgen.models.video_dit.config import AggregationConfig, VideoDiTConfig
from jvgen.models.video_dit.model import VideoDiT
from jvgen.nn import lora
from jvgen.nn.dropout import dropout
from jvgen.nn.lora import Factors, LoraConfig
from jvgen.nn.network import Network
from jvgen.parallel import axes

pytestmark = pytest.mark.usefixtures("quick_compilations")

DIT = VideoDiTConfig(
    layers=2, heads=2, head_width=8, in_channels=4, out_channels=4, text_width=8, text_length=6, condition_width=8,
    zero_init=False, aggregation=AggregationConfig(),
)  # fmt: skip
ALL = LoraConfig(rank=2, targets=("denoiser/",))


@pytest.fixture(scope="module")
def network():
    return Network.of(lambda rngs: VideoDiT(DIT, rngs=rngs))


@pytest.fixture(scope="module")
def factors(network):
    layers = {path.partition("/")[2]: found for path, found in lora.targets(ALL, {"denoiser": network}).items()}
    shapes = Network.of(lambda rngs: Factors(layers, rank=2, rngs=rngs)).shapes
    rng = np.random.default_rng(0)
    return nested.map_with_path(lambda _, leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), shapes)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(1)
    clips, text = rng.standard_normal((2, 3, 4, 4, 4), np.float32), rng.standard_normal((2, 6, 8), np.float32)
    return jnp.asarray(clips), jnp.asarray(text), jnp.array([10.0, 500.0], jnp.float32)


@pytest.fixture(scope="module")
def parameters(network):
    return jax.jit(network.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def beside(network, inputs):
    """Compiled: outputs with factors beside the layers."""
    return jax.jit(
        lambda parameters, factors, keys: lora.apply(
            network, parameters, factors, *inputs, scale=0.5, rate=0.5, keys=keys
        )
    )


def test_beside_the_kernels_is_merged_into_them(network, parameters, factors, inputs, beside):
    """In every linear layer of the network, stacked or not."""
    assert nested.flatten(factors).keys() >= {
        "blocks/layers/attention/query/down", "patch_embedding/projection/up", "output_modulation/projection/down",
    }  # fmt: skip
    merged = jax.jit(network.apply)(lora.merge(parameters, factors, 0.5), *inputs)
    np.testing.assert_allclose(beside(parameters, factors, None), merged, atol=2e-5)
    assert np.abs(merged - network.apply(parameters, *inputs)).max() > 1e-2


def test_an_untrained_adapter_changes_nothing_and_can_be_trained(network, parameters, factors, inputs):
    fresh = nested.map_with_path(lambda path, leaf: leaf * path.endswith("down"), factors)

    @jax.jit
    def gradient(fresh):
        return jax.value_and_grad(lambda some: jnp.sum(jnp.square(lora.apply(network, parameters, some, *inputs))))(
            fresh
        )

    value, gradients = gradient(fresh)
    np.testing.assert_allclose(value, np.sum(np.square(network.apply(parameters, *inputs))), rtol=1e-5)
    moves = {path: np.abs(leaf).max() > 0 for path, leaf in nested.flatten(gradients).items()}
    assert moves == {path: path.endswith("up") for path in moves}


def test_frozen_kernels_have_no_gradient_products(network, factors, inputs):
    """The backward pass of the factors makes nothing with the size of a kernel."""
    config = DIT.replace(heads=4, aggregation=None)
    wide = Network.of(lambda rngs: VideoDiT(config, rngs=rngs))
    layers = {"blocks/layers/attention/query": lora.linear_layers(wide)["blocks/layers/attention/query"]}
    adapters = Network.of(lambda rngs: Factors(layers, rank=2, rngs=rngs)).shapes

    def loss(factors, parameters):
        return jnp.sum(lora.apply(wide, parameters, factors, *inputs))

    jaxpr = str(jax.make_jaxpr(jax.grad(loss))(adapters, wide.shapes))
    assert "32,128]" in jaxpr, "kernels of the feed-forward layer are in the forward pass"
    both = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(adapters, wide.shapes))
    assert jaxpr.count("dot_general") < both.count("dot_general")


def test_dropout_belongs_to_samples(parameters, factors, inputs, beside):
    """The mask of a sample depends on its key alone; the same keys give the same output."""
    keys = jax.random.split(jax.random.key(5), 2)
    dropped = beside(parameters, factors, keys)
    assert np.abs(dropped - beside(parameters, factors, None)).max() > 1e-2
    np.testing.assert_array_equal(dropped, beside(parameters, factors, keys))
    swapped = beside(parameters, factors, keys.at[1].set(jax.random.key(6)))
    np.testing.assert_allclose(swapped[0], dropped[0], atol=1e-6)
    assert np.abs(swapped[1] - dropped[1]).max() > 1e-2


@pytest.mark.parametrize("put", ["beside", "together"])
def test_the_scale_of_bfloat16_factors_is_not_rounded_itself(network, put):
    down, up = np.random.default_rng(0).uniform(1.0, 2.0, (2, 64)).astype(jnp.bfloat16)
    factors = {"text_projection": {"down": jnp.asarray(down).reshape(8, 8), "up": jnp.asarray(up).reshape(4, 16)}}
    if put == "together":
        found = lora.combined([(factors, 2 / 3)])["text_projection"]["up"]
    else:
        module = nnx.merge(network.graph, network.state)
        lora.attach(module, factors, 2 / 3)
        found = module.text_projection.lora.up[...]
    exact = up.astype(np.float32).reshape(4, 16) * np.float32(2 / 3)
    np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_dropout_in_bfloat16_keeps_the_mean(rate):
    x = np.random.default_rng(0).uniform(1.0, 2.0, (2, 4096)).astype(jnp.bfloat16)
    dropped = dropout(jnp.asarray(x), jax.random.split(jax.random.key(0), 2), rate).astype(np.float32)
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept].sum() / x.astype(np.float32)[kept].sum(), 1 / (1 - rate), rtol=2e-4)


def test_several_adapters_add_up(network, parameters, factors, inputs):
    """Of different ranks, and for different layers."""
    query = {"blocks": {"layers": {"attention": {"query": {
        "down": jnp.ones((2, 16, 3)), "up": jnp.full((2, 3, 16), 0.1),
    }}}}}  # fmt: skip
    together = lora.combined([(factors, 0.5), (query, -2.0)])
    expected = nested.flatten(lora.merge(lora.merge(parameters, factors, 0.5), query, -2.0))
    for path, kernel in nested.flatten(lora.merge(parameters, together)).items():
        np.testing.assert_allclose(kernel, expected[path], atol=1e-6, err_msg=path)

    def one_after_the_other(parameters):
        module = network.bind(parameters)
        lora.attach(module, jax.tree.map(jnp.asarray, factors), 0.5)
        lora.attach(module, query, -2.0)
        return module(*inputs)

    apart, merged = jax.jit(one_after_the_other), jax.jit(lambda parameters: network.apply(parameters, *inputs))
    np.testing.assert_allclose(apart(parameters), merged(nested.unflatten(expected)), atol=2e-5)


def test_factors_are_sharded_as_their_kernels(network):
    layers = lora.targets(LoraConfig(rank=2), {"denoiser": network})
    names = nested.flatten(Network.of(lambda rngs: Factors(layers, rank=2, rngs=rngs)).axes)
    assert names["denoiser/blocks/layers/attention/query/down"] == (axes.LAYERS, axes.EMBED, None)
    assert names["denoiser/blocks/layers/attention/query/up"] == (axes.LAYERS, None, axes.HEADS)
    assert len(names) == 8


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("denoiser/blocks/layers/attention/querry", "matches no linear layer.*nearest are .*attention/query"),
        ("blocks/layers/attention/query", "matches no linear layer.*denoiser/blocks/layers/attention/query"),
        ("denoiser/blocks/layers/attention/query_norm", "matches no linear layer"),
        ("discriminator/", "matches no linear layer of denoiser and text_encoder"),
        ("vae/encoder/", "is in vae, which stays; layers with a LoRA are those of denoiser and text_encoder"),
    ],
)
def test_targets_without_effect_are_mistakes(network, pattern, message):
    networks = {"denoiser": network, "text_encoder": network}
    with pytest.raises(ConfigError, match=message):
        lora.targets(LoraConfig(targets=(pattern,)), networks, {"vae": "which stays"})


@pytest.mark.parametrize(
    ("patterns", "chosen"),
    [
        ((r".*attention/query$",), {"denoiser"}),
        ((r"text_encoder/.*attention/query$",), {"text_encoder"}),
        ((r"(denoiser|text_encoder)/.*attention/query$",), {"denoiser", "text_encoder"}),
    ],
)
def test_a_second_network_is_chosen_by_its_name(network, patterns, chosen):
    """So that patterns of earlier versions, which had one network, choose what they did."""
    found = lora.targets(LoraConfig(targets=patterns), {"denoiser": network, "text_encoder": network})
    assert set(found) == {f"{name}/blocks/layers/attention/query" for name in chosen}


def test_no_targets_are_a_mistake(network):
    with pytest.raises(ConfigError, match="targets is empty"):
        lora.targets(LoraConfig(targets=()), {"denoiser": network})
