"""The T5 encoder against transformers' T5EncoderModel: outputs, gradients, weights both ways, and its tokenizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.models.t5 import tokenizer
from jvgen.models.t5.config import T5Config, small, xxl
from jvgen.models.t5.flops import forward_flops
from jvgen.models.t5.model import T5Encoder, relative_buckets
from jvgen.models.t5.torch_map import from_diffusers_config, to_diffusers_config, weight_map
from jvgen.nested import flatten, unflatten
from jvgen.nn.network import Network

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from transformers.models.t5.modeling_t5 import T5Attention  # noqa: E402

pytestmark = pytest.mark.torch

TINY = T5Config(vocabulary=50, width=24, layers=3, heads=3, head_width=16, hidden=40, buckets=8, max_distance=20)


def network_of(config: T5Config) -> Network:
    return Network.of(lambda rngs: T5Encoder(config, rngs=rngs))


def random_parameters(network: Network) -> dict:
    rng = np.random.default_rng(0)
    flat = {}
    for path, shape in flatten(network.shapes).items():
        values = 0.15 * rng.standard_normal(shape.shape).astype(np.float32)
        flat[path] = jnp.asarray(values + 1.0 if path.endswith("norm/scale") else values)
    return unflatten(flat)


def torch_network(config: T5Config, parameters: dict) -> "transformers.T5EncoderModel":
    model = transformers.T5EncoderModel(transformers.T5Config(**to_diffusers_config(config)))
    state = {name: torch.from_numpy(array.copy()) for name, array in weight_map(config).to_torch(parameters)}
    # One table under two names there.
    model.load_state_dict(state | {"encoder.embed_tokens.weight": state["shared.weight"]}, strict=True)
    return model.eval()


def tokens_and_mask() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    tokens = rng.integers(2, TINY.vocabulary, (2, 30)).astype(np.int32)
    tokens[0, 21:], tokens[1, 4:] = 0, 0
    return tokens, tokens > 0


@pytest.mark.parametrize("masked", [False, True])
def test_output_and_gradients_equal_those_of_transformers(masked):
    network = network_of(TINY)
    parameters, (tokens, mask) = random_parameters(network), tokens_and_mask()
    model = torch_network(TINY, parameters)
    # Without a mask its default would be all ones: padding is attended to.
    attention_mask = torch.from_numpy(mask) if masked else None
    theirs = model(torch.from_numpy(tokens).long(), attention_mask=attention_mask).last_hidden_state
    direction = np.random.default_rng(2).standard_normal(theirs.shape).astype(np.float32)
    (theirs * torch.from_numpy(direction)).sum().backward()

    def loss(p):
        output = network.apply(p, jnp.asarray(tokens), jnp.asarray(mask) if masked else None)
        return jnp.sum(output * direction), output

    (_, ours), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(parameters)
    theirs = theirs.detach().numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max(), rtol=0)
    expected = dict(model.named_parameters())
    named = dict(weight_map(TINY).to_torch(gradients))
    assert set(named) == set(expected) - {"encoder.embed_tokens.weight"}
    for name, gradient in named.items():
        wanted = expected[name].grad.numpy()
        np.testing.assert_allclose(gradient, wanted, atol=2e-5 * np.abs(wanted).max(), rtol=0, err_msg=name)


def test_padding_is_attended_to_without_a_mask():
    network = network_of(TINY)
    parameters, (tokens, mask) = random_parameters(network), tokens_and_mask()
    apply = jax.jit(network.apply)
    with_mask, without = apply(parameters, tokens, mask), apply(parameters, tokens)
    assert np.abs(np.asarray(with_mask - without)[:, :4]).max() > 1e-2


@pytest.mark.parametrize("buckets, max_distance", [(32, 128), (8, 20), (16, 64)])
def test_buckets_of_relative_positions(buckets, max_distance):
    ours = relative_buckets(400, buckets=buckets, max_distance=max_distance)
    positions = torch.arange(400)
    theirs = T5Attention._relative_position_bucket(
        positions[None, :] - positions[:, None], bidirectional=True, num_buckets=buckets, max_distance=max_distance
    )
    np.testing.assert_array_equal(ours, theirs.numpy())


def test_weights_return_unchanged_and_a_decoder_is_skipped():
    network = network_of(TINY)
    parameters = random_parameters(network)
    state = {n: t.numpy() for n, t in torch_network(TINY, parameters).state_dict().items()}
    state["decoder.block.0.layer.0.layer_norm.weight"] = np.zeros(24, np.float32)
    state["lm_head.weight"] = np.zeros((50, 24), np.float32)
    back = flatten(weight_map(TINY).from_torch(state, network.shapes))
    for path, value in flatten(parameters).items():
        np.testing.assert_array_equal(back[path], value, err_msg=path)


def test_configuration_returns_unchanged():
    config = transformers.T5Config(**to_diffusers_config(TINY))
    assert from_diffusers_config(config.to_dict()) == TINY
    with pytest.raises(ValueError, match="gated-gelu"):
        from_diffusers_config(transformers.T5Config().to_dict())


def test_unrolled_and_bfloat16():
    parameters, (tokens, _) = random_parameters(network_of(TINY)), tokens_and_mask()
    expected = np.asarray(jax.jit(network_of(TINY).apply)(parameters, tokens))
    unrolled = jax.jit(network_of(TINY.replace(unroll=True)).apply)(parameters, tokens)
    np.testing.assert_allclose(unrolled, expected, atol=1e-5 * np.abs(expected).max())
    rounded = jax.jit(lambda p, t: network_of(TINY).apply(p, t, dtype=jnp.bfloat16))(parameters, tokens)
    assert rounded.dtype == jnp.bfloat16
    assert np.abs(np.asarray(rounded, np.float32) - expected).max() < 0.06 * np.abs(expected).max()


def test_published_sizes():
    sizes = [sum(s.size for s in jax.tree.leaves(network_of(preset()).shapes)) for preset in (small, xxl)]
    assert sizes == [35_332_800, 4_762_310_656]


def test_flops_agree_with_the_compiler():
    config = TINY.replace(width=128, hidden=256, heads=4, head_width=32, unroll=True)
    network = network_of(config)
    tokens = jax.ShapeDtypeStruct((1, 30), jnp.int32)
    counted = jax.jit(network.apply).lower(network.shapes, tokens).cost_analysis()["flops"]
    assert sum(forward_flops(config, 30).values()) == pytest.approx(counted, rel=0.03)


@pytest.fixture
def tokenizer_folder(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "red": 4, "ball": 5, "rolls": 6}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    model.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_tokenizer_pads_and_truncates(tokenizer_folder):
    tokenize = tokenizer.load(tokenizer_folder)
    assert tokenize("a red ball rolls", 7).tolist() == [3, 4, 5, 6, 1, 0, 0]
    assert tokenize("a red ball rolls", 3).tolist() == [3, 4, 1]
    assert tokenize("", 3).tolist() == [1, 0, 0]
    assert tokenize("a", 2).dtype == np.int32


def test_tokenizers_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="tokenizer.json or spiece.model"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{ not json")
    with pytest.raises(ValueError, match="tokenizer.json is not JSON: .* line 1"):
        tokenizer.load(tmp_path)
