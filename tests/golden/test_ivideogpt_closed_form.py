"""The released sizes of iVideoGPT with weights by formula, against numbers of the authors' code: nothing to download.

Every tensor of the original's state dict is filled by a closed form of its name's rank and its elements' indices, so
the networks compared are the real ones: 64x64 and 256x256 tokenizers and the small transformer.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from jvgen.models.ivideogpt.config import CompressiveTokenizerConfig, FrameTransformerConfig
from jvgen.models.ivideogpt.decoding import Decoder
from jvgen.models.ivideogpt.layout import Layout
from jvgen.models.ivideogpt.objective import loss_terms
from jvgen.models.ivideogpt.sampling import SamplingConfig
from jvgen.models.ivideogpt.tokenizer import CompressiveTokenizer, Tokens
from jvgen.models.ivideogpt.torch_map import adapt_transformer, weight_map
from jvgen.models.ivideogpt.transformer import FrameTransformer
from jvgen.nn.network import Network

NUMBERS = json.loads((Path(__file__).parent / "ivideogpt_closed_form.json").read_text())
SMALL = FrameTransformerConfig.small()
HEADS = SMALL.replace(action_width=4, reward=True)
LAYOUT = Layout(
    context_frames=2, future_frames=2, context_tokens=256, future_tokens=16, context_codes=8192, future_codes=8192
)

pytestmark = pytest.mark.slow


def fill(name: str, rank: int, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of the original, by the place of its name among the sorted names."""
    index = np.arange(int(np.prod(shape)), dtype=np.float64)
    noise = np.sin(12.9898 * index + 78.233 * (rank + 1)) * 43758.5453123
    values = np.sqrt(12.0) * (noise - np.floor(noise) - 0.5)
    module, leaf = name.split(".")[-2:]
    if "norm" in module and leaf == "weight":
        values = 1 + 0.1 * values
    elif name.endswith("pos_emb"):
        values = 0.02 * values
    elif len(shape) >= 2:
        values = 0.5 * values if "quantize" in name else values / np.sqrt(np.prod(shape[1:]))
    else:
        values = 0.01 * values
    return values.astype(np.float32).reshape(shape)


class Filled(dict):
    """Names of the original to tensors made when they are read; never all of them at once."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        super().__init__(shapes)
        self.rank = {name: rank for rank, name in enumerate(sorted(shapes))}

    def shape(self, name: str) -> tuple[int, ...]:
        return super().__getitem__(name)

    def __getitem__(self, name: str) -> np.ndarray:
        return fill(name, self.rank[name], self.shape(name))


def filled(config) -> tuple[Network, dict]:
    kind = CompressiveTokenizer if isinstance(config, CompressiveTokenizerConfig) else FrameTransformer
    network = Network.of(lambda rngs: kind(config, rngs=rngs))
    table = weight_map(config)
    return network, table.from_torch(Filled(table.torch_shapes(network.shapes)), network.shapes)


def check(array, expected: dict, name: str, tolerance: float = 1e-4) -> None:
    """Shape, mean, deviation, the first numbers and the last, of an array in their order of axes."""
    array = np.asarray(array, np.float64)
    assert list(array.shape) == expected["shape"], name
    flat = array.reshape(-1)
    found = [flat.mean(), flat.std(ddof=1), *flat[:6], *flat[-3:]]
    wanted = [expected["mean"], expected["std"], *expected["first6"], *expected["last3"]]
    np.testing.assert_allclose(found, wanted, atol=tolerance, err_msg=name)


@pytest.mark.parametrize(
    ("name", "config", "frames"),
    [
        ("tok64_ctx2_T4", CompressiveTokenizerConfig.released_64(), 4),
        ("tok64_ctx1_T3", CompressiveTokenizerConfig.released_64().replace(context_frames=1), 3),
        ("tok256_ctx2_T3", CompressiveTokenizerConfig.released_256(), 3),
    ],
)
def test_tokenizer(name, config, frames):
    numbers = NUMBERS[name]
    network, parameters = filled(config)
    side, count = config.resolution, config.context_frames
    pixels = 0.5 + 0.5 * np.sin(0.013 * np.arange(frames * 3 * side * side, dtype=np.float64))
    video = jnp.asarray(
        rearrange(pixels.astype(np.float32).reshape(1, frames, 3, side, side), "b t c h w -> b t h w c")
    )
    layout = config.layout(frames)
    fixed = fixed_tokens(layout)

    def run(parameters, video, tokens):
        model = network.bind(parameters)
        encoded = model.encoder(video[0, :count])
        latents, conditions = model.encode_context(video[:, :count])
        coded = model.prediction_encoder(video[0, count:], conditions)
        future = model.encode_future(video[:, count:], conditions)
        made = model(video)
        ids = Tokens(layout.context_ids(tokens), layout.future_ids(tokens))
        return encoded.output, latents, coded.output, future, model.tokenize(video), made, model.detokenize(ids)

    encoded, latents, coded, future, tokens, made, decoded = jax.jit(run)(parameters, video, fixed)
    check(rearrange(encoded, "n h w z -> n z h w"), numbers["encoder_out"], "encoder_out")
    check(rearrange(latents, "b t (h w) d -> (b t) d h w", h=16), numbers["quant_conv"], "quant_conv")
    check(rearrange(coded, "n h w z -> n z h w"), numbers["cond_encoder_out"], "cond_encoder_out")
    check(rearrange(future, "b f m d -> (b f) m d"), numbers["quant_linear"], "quant_linear")
    flat = np.asarray(layout.flatten(*tokens))[0]
    expected = np.asarray(numbers["tokens"])
    # The two nearest vectors are 2e-5 apart at one place.
    assert (flat != expected).sum() <= 1, np.flatnonzero(flat != expected)
    assert layout.is_target.sum() == numbers["n_valid_labels"]
    np.testing.assert_allclose(made.context_codes.loss, numbers["vq_loss_ctx"], atol=2e-5)
    np.testing.assert_allclose(made.future_codes.loss, numbers["vq_loss_dyn"], atol=2e-5)
    for part, frames_, key in ((made.future, video[:, count:], "pred"), (made.context, video[:, :count], "ctx")):
        np.testing.assert_allclose(jnp.mean(jnp.abs(part - frames_)), numbers[f"forward_l1_{key}"], atol=2e-5)
    decoded = rearrange(decoded, "b t h w c -> b t c h w")
    check(decoded, numbers["detok_fixed"]["all"], "all frames")
    for number, frame in enumerate(numbers["detok_fixed"]["frames"]):
        check(decoded[:, number], frame, f"frame {number}")


def fixed_tokens(layout: Layout) -> jax.Array:
    """Ids by formula: 37 times the position in the context; lines of other slopes in future frames."""
    ids = 37 * np.arange(layout.length) % layout.context_codes
    slots = np.setdiff1d(np.arange(layout.prompt_length), layout.context_positions)
    ids[slots], ids[layout.future_slots] = layout.context_slot, layout.future_slot
    for frame, positions in enumerate(layout.future_positions):
        line = (401 + 332 * frame) * np.arange(layout.future_tokens) + 5 * frame
        ids[positions] = layout.context_codes + line % layout.future_codes
    return jnp.asarray(ids, jnp.int32)[None]


def test_fixed_tokens():
    np.testing.assert_array_equal(fixed_tokens(LAYOUT)[0], NUMBERS["fixed_tokens_ctx2_T4"])


@pytest.fixture(scope="module")
def with_heads() -> dict:
    """Parameters of the small transformer with heads: the numbers without actions are of the same weights."""
    return filled(HEADS)[1]


def test_transformer(with_heads):
    numbers = NUMBERS["llama138m"]
    network = Network.of(lambda rngs: FrameTransformer(SMALL, rngs=rngs))
    parameters = adapt_transformer(with_heads, HEADS, SMALL)
    tokens = jnp.asarray(NUMBERS["fixed_tokens_ctx2_T4"], jnp.int32)[None]

    def run(parameters, tokens):
        model = network.bind(parameters)
        hidden = model(tokens)
        return model.embed(tokens), hidden, model.logits(hidden)[0], loss_terms(model, tokens, LAYOUT).cross_entropy

    embedded, hidden, logits, loss = jax.jit(run)(parameters, tokens)
    np.testing.assert_allclose(loss, numbers["ce_no_action"], atol=1e-4)
    check(embedded, numbers["embed_stats"], "embeddings")
    check(hidden, numbers["final_hidden_stats"], "hidden")
    compare_logits(logits, numbers, "no_action")
    decoder = Decoder(SMALL, LAYOUT, SamplingConfig(greedy=True), forced_slots=False)
    check_greedy(decoder, parameters, tokens, None, numbers["greedy_no_action"])


def test_transformer_with_actions_and_rewards(with_heads):
    numbers, parameters = NUMBERS["llama138m"], with_heads
    network = Network.of(lambda rngs: FrameTransformer(HEADS, rngs=rngs))
    tokens = jnp.asarray(NUMBERS["fixed_tokens_ctx2_T4"], jnp.int32)[None]
    actions = jnp.cos(jnp.arange(16, dtype=jnp.float32)).reshape(1, 4, 4)[:, LAYOUT.action_frames]

    def run(parameters, tokens, actions):
        model = network.bind(parameters)
        hidden = model(tokens, LAYOUT, actions)
        rewards = model.rewards(hidden[:, LAYOUT.reward_positions])
        return model.logits(hidden)[0], rewards, loss_terms(model, tokens, LAYOUT, actions=actions).cross_entropy

    logits, rewards, loss = jax.jit(run)(parameters, tokens, actions)
    np.testing.assert_allclose(loss, numbers["ce_action"], atol=1e-4)
    np.testing.assert_allclose(rewards[0], numbers["reward"], atol=1e-4)
    compare_logits(logits, numbers, "action")
    check_greedy(
        Decoder(HEADS, LAYOUT, SamplingConfig(greedy=True)), parameters, tokens, actions, numbers["greedy_action"]
    )


def compare_logits(logits, numbers, name: str) -> None:
    for position, argmax in zip(numbers["positions"], numbers[f"argmax_{name}"], strict=True):
        np.testing.assert_allclose(logits[position, :8], numbers[f"logits_{name}_first8"][str(position)], atol=1e-4)
        assert int(jnp.argmax(logits[position])) == argmax


def check_greedy(decoder: Decoder, parameters, tokens, actions, expected: list[int]) -> None:
    """33 ids after the first slot: 16, a slot, 16. One after the other, and guessed together."""
    ids = []
    for parallel in (False, True):
        one = Decoder(decoder.config, decoder.layout, decoder.sampling.replace(parallel=parallel), decoder.forced_slots)
        made, _ = jax.jit(lambda p, t, a, d=one: d.rollout(d.prepare(p), t, a, jax.random.split(jax.random.key(0), 1)))(
            parameters, tokens[:, : LAYOUT.prompt_length], actions
        )
        ids.append(np.asarray(made))
    np.testing.assert_array_equal(ids[0], ids[1])
    wanted = np.asarray(expected)
    np.testing.assert_array_equal(ids[0][0], np.stack([wanted[:16], wanted[17:]]))
