"""iVideoGPT's transformer against transformers' Llama; its files both ways, and keys that released files lack."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.interop.digest import DIGESTS_FILE
from jvgen.interop.from_torch import import_folder, read_config
from jvgen.interop.to_torch import export_network
from jvgen.interop.verify import VerifyError, verify
from jvgen.models.ivideogpt import torch_map
from jvgen.models.ivideogpt.config import CompressiveTokenizerConfig, FrameTransformerConfig
from jvgen.models.ivideogpt.layout import Layout
from jvgen.models.ivideogpt.objective import loss_terms
from jvgen.models.ivideogpt.tokenizer import CompressiveTokenizer
from jvgen.models.ivideogpt.tokenizer_map import tokenizer_map
from jvgen.models.ivideogpt.transformer import FrameTransformer
from jvgen.models.ivideogpt.transformer_map import transformer_from_json, transformer_map, transformer_to_json
from jvgen.models.weight_map import WeightError
from jvgen.nested import flatten, unflatten
from jvgen.nn.network import Network

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.torch

PLAIN = FrameTransformerConfig(vocabulary=32, width=24, layers=2, heads=3, hidden=40, max_positions=64)
HEADS = PLAIN.replace(action_width=4, reward=True)
LAYOUT = Layout(context_frames=2, future_frames=3, context_tokens=6, future_tokens=4, context_codes=18, future_codes=12)
TOKENIZER = CompressiveTokenizerConfig(
    resolution=16, block_channels=(8, 32), layers_per_block=1, groups=4, latent_channels=4, code_width=3,
    context_codes=18, future_codes=12, attention_side=16, attention_groups=4,
)  # fmt: skip


def network_of(config) -> Network:
    kind = CompressiveTokenizer if isinstance(config, CompressiveTokenizerConfig) else FrameTransformer
    return Network.of(lambda rngs: kind(config, rngs=rngs))


def random_parameters(config, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    flat = {}
    for path, shape in flatten(network_of(config).shapes).items():
        values = 0.2 * rng.standard_normal(shape.shape).astype(np.float32)
        flat[path] = values + np.float32(path.endswith("scale"))
    return unflatten(flat)


def llama(config: FrameTransformerConfig, parameters: dict) -> "transformers.LlamaForCausalLM":
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**transformer_to_json(config)))
    state = {name: torch.from_numpy(array.copy()) for name, array in transformer_map(config).to_torch(parameters)}
    model.load_state_dict(state, strict=True)
    return model.eval()


def test_loss_and_gradients_equal_those_of_llama():
    parameters = random_parameters(PLAIN)
    tokens = np.random.default_rng(1).integers(0, LAYOUT.vocabulary, (2, LAYOUT.length)).astype(np.int32)
    model = llama(PLAIN, parameters)
    labels = torch.from_numpy(np.where(LAYOUT.is_target, tokens, -100)).long()
    output = model(input_ids=torch.from_numpy(tokens).long(), labels=labels)
    output.loss.backward()
    network = network_of(PLAIN)

    def loss(p):
        model = network.bind(p)
        return loss_terms(model, jnp.asarray(tokens), LAYOUT).cross_entropy, model.logits(model(jnp.asarray(tokens)))

    (value, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(parameters)
    np.testing.assert_allclose(value, output.loss.item(), rtol=1e-6)
    np.testing.assert_allclose(logits, output.logits.detach().numpy(), atol=1e-5)
    expected = dict(model.named_parameters())
    named = dict(transformer_map(PLAIN).to_torch(gradients))
    assert set(named) == set(expected)
    for name, gradient in named.items():
        wanted = expected[name].grad.numpy()
        np.testing.assert_allclose(gradient, wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0, err_msg=name)


@pytest.mark.parametrize("config", [PLAIN, HEADS, HEADS.replace(reward=False)], ids=["plain", "heads", "action"])
def test_exports_load_strictly_with_equal_outputs(tmp_path, config):
    parameters = random_parameters(config)
    folder = export_network(config, parameters, tmp_path / "transformer", shard_bytes=8000)
    found, imported = import_folder(folder)
    assert found == config
    report = verify(folder, found, imported)
    assert report.max_abs_error < 1e-5 and min(report.scales.values()) > 0.1, str(report)
    assert set(report.errors) == ({"logits", "rewards"} if config.reward else {"logits"})
    for path, value in flatten(parameters).items():
        np.testing.assert_array_equal(flatten(imported)[path], value, err_msg=path)


def test_heads_are_read_off_the_tensors_of_released_files(tmp_path):
    """Their config.json is that of a plain Llama; the action width is the shape of a tensor."""
    folder = export_network(HEADS, random_parameters(HEADS), tmp_path / "transformer")
    values = json.loads((folder / "config.json").read_text())
    for name in ("action_dim", "reward_prediction", "action_recon"):
        del values[name]
    (folder / DIGESTS_FILE).unlink()
    (folder / "config.json").write_text(json.dumps(values))
    assert read_config(folder) == HEADS
    plain = export_network(PLAIN, random_parameters(PLAIN), tmp_path / "plain")
    assert read_config(plain) == PLAIN


def test_missing_tensors_of_a_wrapped_llama(tmp_path):
    folder = export_network(HEADS, random_parameters(HEADS), tmp_path / "transformer")
    fewer = HEADS.replace(layers=1)
    other = export_network(fewer, random_parameters(fewer), tmp_path / "fewer")
    (other / DIGESTS_FILE).unlink()
    (other / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(WeightError, match="missing"):
        import_folder(other)
    with pytest.raises(VerifyError, match="strictly"):
        verify(other, HEADS, random_parameters(HEADS))


def test_config_round_trip_and_unsupported_llamas():
    for config in (PLAIN, HEADS, FrameTransformerConfig.small()):
        theirs = transformers.LlamaConfig(**transformer_to_json(config))
        assert transformer_from_json(theirs.to_dict()) == config
    for change in ({"num_key_value_heads": 1}, {"attention_bias": True}, {"hidden_act": "gelu"}):
        with pytest.raises(ValueError, match=next(iter(change))):
            transformer_from_json(transformer_to_json(PLAIN) | change)


def test_tokenizer_round_trip(tmp_path):
    parameters = random_parameters(TOKENIZER)
    folder = export_network(TOKENIZER, parameters, tmp_path / "tokenizer")
    assert (folder / "diffusion_pytorch_model.safetensors").is_file()
    found, imported = import_folder(folder)
    assert found == TOKENIZER
    assert verify(folder, found, imported).max_abs_error == 0
    assert all(np.array_equal(flatten(imported)[path], value) for path, value in flatten(parameters).items())


def test_released_sizes():
    """Parameters and tensors of the released networks; every tensor is written by one row of the table."""
    tokenizers = {
        CompressiveTokenizerConfig.released_64(): (114_159_174, 420),
        CompressiveTokenizerConfig.released_256(): (310_472_774, 624),
    }
    for config, (count, tensors) in tokenizers.items():
        shapes = tokenizer_map(config).torch_shapes(network_of(config).shapes)
        assert (sum(int(np.prod(shape)) for shape in shapes.values()), len(shapes)) == (count, tensors)
    small, medium = FrameTransformerConfig.small(), FrameTransformerConfig.medium()
    transformers_ = {small: (138_434_304, 111), medium: (436_261_888, 219)}
    transformers_[small.replace(action_width=4, reward=True)] = (138_434_304 + 5 * 768 + 769, 115)
    for config, (count, tensors) in transformers_.items():
        shapes = transformer_map(config).torch_shapes(network_of(config).shapes)
        assert (sum(int(np.prod(shape)) for shape in shapes.values()), len(shapes)) == (count, tensors)
    # The file of a tokenizer with one frame of context less: 455,374,184 bytes against 456,684,912, headers included.
    one = CompressiveTokenizerConfig.released_64().replace(context_frames=1)
    shapes = tokenizer_map(one).torch_shapes(network_of(one).shapes)
    fewer = 114_159_174 - sum(int(np.prod(shape)) for shape in shapes.values())
    assert fewer == 5 * 256 * 256 and abs(4 * fewer - (456_684_912 - 455_374_184)) < 16


def test_weights_adapted_to_other_contexts_and_heads():
    parameters = random_parameters(TOKENIZER)
    one = TOKENIZER.replace(context_frames=1)
    cut = flatten(torch_map.adapt_tokenizer(parameters, TOKENIZER, one))
    for path, shape in flatten(network_of(one).shapes).items():
        assert cut[path].shape == shape.shape, path
    path = "prediction_decoder/sites/0/context_positions"
    np.testing.assert_array_equal(cut[path], flatten(parameters)[path][64:])
    # More frames: the positions that are there belong to the last ones.
    three = TOKENIZER.replace(context_frames=3)
    grown = torch_map.adapt_tokenizer(parameters, TOKENIZER, three)
    for path, shape in flatten(network_of(three).shapes).items():
        assert flatten(grown)[path].shape == shape.shape, path
    site = "prediction_encoder/sites/0/context_positions"
    np.testing.assert_array_equal(flatten(grown)[site][:64], flatten(parameters)[site][:64])
    back = torch_map.adapt_tokenizer(grown, three, TOKENIZER)
    jax.tree.map(np.testing.assert_array_equal, back, jax.tree.map(np.asarray, parameters))
    with pytest.raises(ValueError, match="more than context_frames"):
        torch_map.adapt_tokenizer(parameters, TOKENIZER, one.replace(code_width=4))

    heads = random_parameters(HEADS)
    assert set(torch_map.adapt_transformer(heads, HEADS, HEADS)) == set(heads)
    assert set(heads) - set(torch_map.adapt_transformer(heads, HEADS, HEADS.replace(action_width=2))) == {"action"}
    assert set(heads) - set(torch_map.adapt_transformer(heads, HEADS, PLAIN)) == {"action", "reward"}
    with pytest.raises(ValueError, match="more than their heads"):
        torch_map.adapt_transformer(heads, HEADS, HEADS.replace(layers=3))


def test_new_action_projection_changes_nothing():
    """It is zero: an action-free model given actions starts as what it was."""
    network = network_of(HEADS)
    parameters = network.init(jax.random.key(0))
    tokens = jnp.zeros((1, LAYOUT.length), jnp.int32)
    run = jax.jit(lambda p, a: network.apply(p, tokens, LAYOUT, a))
    actions = jnp.ones((1, LAYOUT.future_frames, 4))
    np.testing.assert_array_equal(run(parameters, actions), run(parameters, 0 * actions))
