"""The byte-level text encoder: its tokens, its network, its file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.models.byte_text.config import ByteTextConfig
from jvgen.models.byte_text.flops import forward_flops
from jvgen.models.byte_text.model import ByteTextEncoder
from jvgen.models.byte_text.tokenizer import END, FIRST_BYTE, PAD, VOCABULARY, detokenize, tokenize, truncated_text
from jvgen.models.byte_text.torch_map import from_diffusers_config, to_diffusers_config, weight_map
from jvgen.nested import flatten
from jvgen.nn.network import Network

TINY = ByteTextConfig(width=32, layers=2, heads=2)


def network_of(config: ByteTextConfig) -> Network:
    return Network.of(lambda rngs: ByteTextEncoder(config, rngs=rngs))


@pytest.fixture(scope="module")
def parameters() -> dict:
    return jax.jit(network_of(TINY).init)(jax.random.key(0))


def test_tokens_are_bytes_then_an_end_then_padding():
    assert tokenize("ab", 5).tolist() == [FIRST_BYTE + 97, FIRST_BYTE + 98, END, PAD, PAD]
    assert tokenize("", 2).tolist() == [END, PAD]
    assert tokenize("abc", 2).tolist() == [FIRST_BYTE + 97, END]
    with pytest.raises(ValueError, match="length = 0"):
        tokenize("a", 0)


@pytest.mark.parametrize("caption", ["a red ball rolls left", "", "ein Würfel fällt", "立方体 🟥"])
def test_captions_survive(caption):
    assert detokenize(tokenize(caption, 64)) == caption
    read = detokenize(tokenize(caption, 5))
    assert caption.startswith(read) and truncated_text(caption, 5) == caption[len(read) :].strip()
    assert truncated_text(caption, 64) == ""


def test_embeddings_depend_on_every_byte_and_its_place(parameters):
    apply = jax.jit(network_of(TINY).apply)

    def embed(caption):
        return np.asarray(apply(parameters, jnp.asarray(tokenize(caption, 12))[None]))

    assert embed("red ball").shape == (1, 12, 32)
    # Every row sees the whole caption.
    assert np.abs(embed("red ball") - embed("rad ball"))[0].max(axis=-1).min() > 1e-4
    assert np.abs(embed("ab") - embed("ba")).max() > 1e-2


def test_every_token_has_an_embedding():
    assert network_of(TINY).shapes["embedding"]["table"].shape[0] == VOCABULARY == 258


def test_it_learns(parameters):
    network = network_of(TINY)
    tokens = jnp.asarray(np.stack([tokenize(caption, 8) for caption in ("red", "blue")]))
    target = jnp.asarray([1.0, -1.0])

    @jax.jit
    def step(p):
        def loss(p):
            return jnp.mean(jnp.square(network.apply(p, tokens).mean(axis=1)[:, 0] - target))

        value, gradients = jax.value_and_grad(loss)(p)
        return jax.tree.map(lambda old, gradient: old - 0.2 * gradient, p, gradients), value

    losses = []
    for _ in range(30):
        parameters, value = step(parameters)
        losses.append(float(value))
    assert losses[-1] < 0.2 * losses[0]


def test_layers_unrolled_and_bfloat16(parameters):
    tokens = jnp.asarray(tokenize("a red ball", 16))[None]
    expected = np.asarray(jax.jit(network_of(TINY).apply)(parameters, tokens))
    unrolled = jax.jit(network_of(TINY.replace(unroll=True)).apply)(parameters, tokens)
    np.testing.assert_allclose(unrolled, expected, atol=1e-5)
    rounded = jax.jit(lambda p, t: network_of(TINY).apply(p, t, dtype=jnp.bfloat16))(parameters, tokens)
    assert rounded.dtype == jnp.bfloat16
    assert np.abs(np.asarray(rounded, np.float32) - expected).max() < 0.05 * np.abs(expected).max()


def test_weights_and_configuration_return_unchanged(parameters):
    table = weight_map(TINY)
    state = dict(table.to_torch(parameters))
    assert state["blocks.1.query.weight"].shape == (32, 32)
    back = flatten(table.from_torch(state, network_of(TINY).shapes))
    for path, value in flatten(parameters).items():
        np.testing.assert_array_equal(back[path], value, err_msg=path)
    assert from_diffusers_config(to_diffusers_config(TINY)) == TINY
    with pytest.raises(ValueError, match="lacks width"):
        from_diffusers_config({"layers": 1, "heads": 1, "feed_forward_ratio": 4, "norm_epsilon": 1e-5})


def test_flops_agree_with_the_compiler():
    config = TINY.replace(width=128, unroll=True)
    network = network_of(config)
    tokens = jax.ShapeDtypeStruct((1, 32), jnp.int32)
    counted = jax.jit(network.apply).lower(network.shapes, tokens).cost_analysis()["flops"]
    assert sum(forward_flops(config, 32).values()) == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("change, message", [({"heads": 3}, "heads = 3"), ({"layers": 0}, "layers = 0")])
def test_impossible_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TINY.replace(**change).validate()
