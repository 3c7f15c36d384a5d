"""Parts of iVideoGPT: layout, codebook, sampling, decoding against one pass without a cache, FLOPs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.config import ConfigError, validate_tree
from jvgen.models.ivideogpt import flops
from jvgen.models.ivideogpt.codebook import Codebook, perplexity, usage
from jvgen.models.ivideogpt.config import CompressiveTokenizerConfig, FrameTransformerConfig
from jvgen.models.ivideogpt.decoding import Decoder
from jvgen.models.ivideogpt.layout import Layout
from jvgen.models.ivideogpt.objective import loss_terms, symexp, symlog
from jvgen.models.ivideogpt.sampling import SamplingConfig, candidates, choose
from jvgen.models.ivideogpt.tokenizer import CompressiveTokenizer
from jvgen.models.ivideogpt.transformer import FrameTransformer
from jvgen.nn import attention as front
from jvgen.nn.network import Network

LAYOUT = Layout(context_frames=2, future_frames=3, context_tokens=6, future_tokens=4, context_codes=18, future_codes=12)
TINY = FrameTransformerConfig(
    vocabulary=32, width=24, layers=2, heads=3, hidden=40, max_positions=64, action_width=2, reward=True
)
TOKENIZER = CompressiveTokenizerConfig(
    resolution=16, block_channels=(8, 16), layers_per_block=1, groups=4, latent_channels=4, code_width=3,
    context_codes=18, future_codes=12, attention_side=8, attention_groups=4,
)  # fmt: skip


# Layout.


def test_positions():
    assert (LAYOUT.prompt_length, LAYOUT.frame_length, LAYOUT.length, LAYOUT.vocabulary) == (13, 5, 28, 32)
    ids = np.asarray(LAYOUT.flatten(jnp.zeros((1, 2, 6), jnp.int32), jnp.zeros((1, 3, 4), jnp.int32)))[0]
    assert ids.tolist() == [0] * 6 + [30] + [0] * 6 + ([31] + [18] * 4) * 3
    assert LAYOUT.future_slots.tolist() == [13, 18, 23] and LAYOUT.reward_positions.tolist() == [17, 22, 27]
    assert LAYOUT.action_frames.tolist() == [1, 2, 3]
    assert LAYOUT.is_target.sum() == 5 * 3 - 1
    every = np.concatenate([LAYOUT.context_positions.reshape(-1), LAYOUT.future_positions.reshape(-1)])
    assert sorted([*every, *LAYOUT.future_slots, 6]) == list(range(28))


@pytest.mark.parametrize(
    ("context", "frames", "length", "targets"),
    [(2, 16, 751, 237), (2, 17, 768, 254), (1, 16, 511, 254), (2, 12, 683, 169)],
)
def test_published_lengths(context, frames, length, targets):
    layout = CompressiveTokenizerConfig.released_64().replace(context_frames=context).layout(frames)
    assert (layout.length, layout.is_target.sum(), layout.vocabulary) == (length, targets, 16386)


def test_ids_outside_the_codebook_or_vocabulary(parameters):
    decoder = Decoder(TINY, LAYOUT)
    ids = jnp.array([0, 17, 18, 29, 30, 31])
    assert LAYOUT.clamp_future_codes(ids).tolist() == [0, 0, 0, 11, 11, 11]
    with pytest.raises(ValueError, match="ids from -1 to 3: this vocabulary has 0..31"):
        LAYOUT.check_ids(np.concatenate([[-1], np.full(27, 3)])[None])
    with pytest.raises(ValueError, match="ids from 0 to 32"):
        LAYOUT.check_ids(np.concatenate([[32], np.zeros(27, int)]))
    with pytest.raises(ValueError, match="a sequence of 27 ids: .* are 13, 3 future frames more 28"):
        LAYOUT.check_ids(np.zeros(27, int))
    with pytest.raises(ValueError, match="ids from 32 to 32: this vocabulary has 0..31"):
        decoder.prefill(decoder.prepare(parameters), jnp.full((1, LAYOUT.prompt_length), 32))


# Codebook.


def test_codebook(key):
    network = Network.of(lambda rngs: Codebook(7, 3, commitment=0.25, rngs=rngs))
    table = jax.random.normal(key, (7, 3))
    latents = jax.random.normal(jax.random.key(1), (5, 4, 3))

    def loss(table, latents):
        made = network.apply({"table": table}, latents, method="quantize")
        return made.loss, made

    (value, made), (to_table, to_latents) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(table, latents)
    distance = np.linalg.norm(np.asarray(latents)[..., None, :] - np.asarray(table), axis=-1)
    np.testing.assert_array_equal(made.ids, distance.argmin(-1))
    np.testing.assert_allclose(made.vectors, table[made.ids], atol=1e-6)
    square = np.mean(distance.min(-1) ** 2) / 3
    np.testing.assert_allclose(value, 1.25 * square, rtol=1e-5)
    difference = np.asarray(latents) - np.asarray(table)[np.asarray(made.ids)]
    np.testing.assert_allclose(to_latents, 0.25 * 2 * difference / difference.size, atol=1e-7)
    expected = np.zeros((7, 3))
    np.add.at(expected, np.asarray(made.ids).reshape(-1), -2 * difference.reshape(-1, 3) / difference.size)
    np.testing.assert_allclose(to_table, expected, atol=1e-7)
    # What comes after sees through to the latents.
    through = jax.grad(lambda z: jnp.sum(network.apply({"table": table}, z, method="quantize").vectors ** 2))(latents)
    np.testing.assert_allclose(through, 2 * made.vectors, atol=1e-6)


def test_code_usage_and_perplexity():
    counts = usage(jnp.array([[0, 1], [1, 3]]), 5)
    assert counts.tolist() == [1, 2, 0, 1, 0]
    np.testing.assert_allclose(perplexity(counts), np.exp(1.5 * np.log(2)), rtol=1e-6)
    np.testing.assert_allclose(perplexity(jnp.ones(8)), 8, rtol=1e-6)
    assert float(perplexity(jnp.zeros(8))) == 1


# Sampling.

LOGITS = jnp.asarray(np.random.default_rng(0).normal(size=200).astype(np.float32) * 2)


def shares(sampling: SamplingConfig, count: int = 20_000) -> np.ndarray:
    keys = jax.random.split(jax.random.key(0), count)
    rows = jnp.broadcast_to(LOGITS, (count, 200))
    ids = jax.jit(lambda rows, keys: choose(rows, keys, sampling))(rows, keys)
    return np.bincount(np.asarray(ids), minlength=200) / count


def test_sampling_frequencies_match_the_probabilities():
    """Top-k: the k likeliest ids, their probabilities renormalized."""
    found = shares(SamplingConfig(top_k=10))
    best = np.argsort(-np.asarray(LOGITS))[:10]
    expected = np.zeros(200)
    expected[best] = np.exp(LOGITS[best]) / np.exp(LOGITS[best]).sum()
    assert set(np.flatnonzero(found)) == set(best)
    assert np.abs(found - expected).max() < 0.012


def test_temperature_and_top_p():
    torch = pytest.importorskip("torch")
    warpers = pytest.importorskip("transformers.generation.logits_process")
    scores = torch.from_numpy(np.array(LOGITS))[None]
    for sampling in (
        SamplingConfig(top_k=0, top_p=0.7), SamplingConfig(top_k=40, top_p=0.9, temperature=0.5),
        SamplingConfig(top_k=100), SamplingConfig(top_k=0, temperature=2.0),
    ):  # fmt: skip
        theirs = warpers.TemperatureLogitsWarper(sampling.temperature)(None, scores)
        if sampling.top_k:
            theirs = warpers.TopKLogitsWarper(sampling.top_k)(None, theirs)
        theirs = warpers.TopPLogitsWarper(sampling.top_p)(None, theirs)[0].numpy()
        left, ids = candidates(LOGITS, sampling)
        ours = np.full(200, -np.inf, np.float32)
        ours[np.arange(200) if ids is None else np.asarray(ids)] = np.asarray(left)
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_greedy_sampling_and_bad_configs():
    assert shares(SamplingConfig(greedy=True), 10)[int(jnp.argmax(LOGITS))] == 1
    for change, words in (({"temperature": 0.0}, "temperature"), ({"top_k": -1}, "top_k"), ({"top_p": 0.0}, "top_p")):
        with pytest.raises(ConfigError, match=words):
            validate_tree(SamplingConfig(**change))


# Decoding.


@pytest.fixture(scope="module")
def network() -> Network:
    return Network.of(lambda rngs: FrameTransformer(TINY, rngs=rngs))


@pytest.fixture(scope="module")
def parameters(network):
    """Larger than initial ones, so that scores differ."""
    shapes, structure = jax.tree.flatten(network.shapes)
    keys = jax.random.split(jax.random.key(3), len(shapes))
    return structure.unflatten(
        [0.4 * jax.random.normal(key, s.shape) + float(s.ndim == 1) for key, s in zip(keys, shapes, strict=True)]
    )


def roll(
    parameters, sampling: SamplingConfig, *, rows: int = 4, samples: int = 1, forced: bool = True, seed: int = 0,
    config: FrameTransformerConfig = TINY,
):  # fmt: skip
    """Ids and rewards of `rows` sequences from rows / samples prompts."""
    rng = np.random.default_rng(seed)
    context = jnp.asarray(rng.integers(0, 18, (rows // samples, 2, 6)), jnp.int32)
    actions = jnp.asarray(rng.normal(size=(rows, 3, 2)), jnp.float32)
    decoder = Decoder(config, LAYOUT, sampling, forced_slots=forced)
    keys = jax.random.split(jax.random.key(seed), rows)
    prompt = LAYOUT.prompt(context)
    ids, rewards = jax.jit(lambda p: decoder.rollout(decoder.prepare(p), prompt, actions, keys))(parameters)
    return prompt, actions, np.asarray(ids), np.asarray(rewards)


def sequences(prompt: jax.Array, ids: np.ndarray, samples: int) -> jax.Array:
    framed = np.concatenate([np.full((*ids.shape[:2], 1), LAYOUT.future_slot), ids], axis=-1).reshape(len(ids), -1)
    return jnp.asarray(np.concatenate([np.repeat(np.asarray(prompt), samples, 0), framed], axis=1), jnp.int32)


@pytest.fixture(scope="module")
def greedy(parameters):
    return roll(parameters, SamplingConfig(greedy=True))


def test_greedy_ids_equal_the_argmax_without_a_cache(network, parameters, greedy):
    """One training pass over the generated sequence: every generated id is the argmax at its position."""
    prompt, actions, ids, rewards = greedy

    def run(p, tokens, actions):
        hidden = network.apply(p, tokens, LAYOUT, actions)
        return network.apply(p, hidden, method="logits"), network.apply(
            p, hidden[:, LAYOUT.reward_positions], method="rewards"
        )

    logits, expected = jax.jit(run)(parameters, sequences(prompt, ids, 1), actions)
    np.testing.assert_array_equal(np.argmax(logits, -1)[:, LAYOUT.future_positions - 1], ids)
    np.testing.assert_allclose(rewards, expected, atol=2e-5)
    assert len(np.unique(ids)) > 4


def test_parallel_decoding_equals_sequential(parameters, greedy):
    _, _, ids, rewards = greedy
    _, _, together, theirs = roll(parameters, SamplingConfig(greedy=True, parallel=True))
    np.testing.assert_array_equal(together, ids)
    np.testing.assert_allclose(theirs, rewards, atol=2e-5)
    drawn = [roll(parameters, SamplingConfig(top_k=9, parallel=parallel))[2] for parallel in (False, True)]
    np.testing.assert_array_equal(*drawn)
    assert (drawn[0] != ids).any()


def test_places_and_actions_at_all_ids_decode_as_they_train():
    """Both additions matter, and a rollout adds them where a training pass does, decoded one by one or in parallel."""
    config = TINY.replace(tokens_per_frame=(6, 4), action_everywhere=True)
    network = Network.of(lambda rngs: FrameTransformer(config, rngs=rngs))
    rng = np.random.default_rng(5)
    parameters = jax.tree.map(
        lambda s: jnp.asarray(0.4 * rng.normal(size=s.shape) + (s.ndim == 1), jnp.float32), network.shapes
    )
    prompt, actions, ids, _ = roll(parameters, SamplingConfig(greedy=True), config=config)
    together = roll(parameters, SamplingConfig(greedy=True, parallel=True), config=config)[2]
    np.testing.assert_array_equal(together, ids)
    tokens = sequences(prompt, ids, 1)

    def scores(p, config):
        network = Network.of(lambda rngs: FrameTransformer(config, rngs=rngs))
        return network.apply(p, network.apply(p, tokens, LAYOUT, actions), method="logits")

    logits = jax.jit(scores, static_argnums=1)(parameters, config)
    np.testing.assert_array_equal(np.argmax(logits, -1)[:, LAYOUT.future_positions - 1], ids)
    at_slots = jax.jit(scores, static_argnums=1)(parameters, config.replace(action_everywhere=False))
    without = {name: value for name, value in parameters.items() if name != "place"}
    blind = jax.jit(scores, static_argnums=1)(without, config.replace(tokens_per_frame=None))
    for other in (at_slots, blind):
        assert np.abs(other - logits)[:, LAYOUT.future_positions].max() > 0.1
    with pytest.raises(ValueError, match=r"tokens_per_frame = \(6, 4\): the tokenizer gives 64 ids .* and 4"):
        config.check_tokenizer(TOKENIZER, 3)


def test_samples_of_one_prompt_equal_rows_of_repeated_prompts(parameters):
    sampling = SamplingConfig(top_k=9)
    prompt, actions, ids, rewards = roll(parameters, sampling, rows=6, samples=3)
    decoder = Decoder(TINY, LAYOUT, sampling)
    keys = jax.random.split(jax.random.key(0), 6)
    repeated = jnp.repeat(prompt, 3, axis=0)
    apart, theirs = jax.jit(lambda p: decoder.rollout(decoder.prepare(p), repeated, actions, keys))(parameters)
    np.testing.assert_array_equal(ids, apart)
    np.testing.assert_allclose(rewards, theirs, atol=2e-5)
    assert (ids[0] != ids[1]).any()


def test_a_row_does_not_depend_on_the_others(parameters):
    sampling = SamplingConfig(top_k=9)
    prompt, actions, ids, _ = roll(parameters, sampling)
    decoder, keys = Decoder(TINY, LAYOUT, sampling), jax.random.split(jax.random.key(0), 4)
    alone, _ = jax.jit(lambda p: decoder.rollout(decoder.prepare(p), prompt[2:3], actions[2:3], keys[2:3]))(parameters)
    np.testing.assert_array_equal(alone[0], ids[2])


def test_future_codes_only(parameters):
    for greedy in (False, True):
        _, _, ids, _ = roll(parameters, SamplingConfig(top_k=0, temperature=5.0, future_codes_only=True, greedy=greedy))
        assert ids.min() >= 18 and ids.max() < 30
    _, _, ids, _ = roll(parameters, SamplingConfig(top_k=0, temperature=5.0))
    assert ids.min() < 18 or ids.max() >= 30


def test_bfloat16_decodes(parameters):
    decoder = Decoder(TINY, LAYOUT, SamplingConfig(greedy=True), dtype=jnp.bfloat16)
    prompt, actions, ids, rewards = roll(parameters, SamplingConfig(greedy=True))
    weights = decoder.prepare(parameters)
    assert {leaf.dtype for leaf in jax.tree.leaves(weights) if leaf.ndim > 1} == {jnp.dtype(jnp.bfloat16)}
    made, theirs = jax.jit(decoder.rollout)(weights, prompt, actions, jax.random.split(jax.random.key(0), 4))
    assert made.shape == ids.shape and theirs.dtype == jnp.float32


# Losses.


def test_symlog():
    values = jnp.array([-30.0, -0.5, 0.0, 1e-3, 30.0])
    np.testing.assert_allclose(symexp(symlog(values)), values, rtol=1e-5)
    np.testing.assert_allclose(symlog(jnp.array(np.e - 1)), 1.0, rtol=1e-6)


def test_dropout_depends_on_the_sequence_alone(network, parameters):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 32, (3, LAYOUT.length)), jnp.int32)
    actions = jnp.ones((3, 3, 2))
    keys = jax.random.split(jax.random.key(0), 3)

    def run(p, tokens, actions, keys):
        return loss_terms(
            network.bind(p), tokens, LAYOUT, actions=actions, rewards=jnp.zeros(tokens.shape[:1] + (3,)), keys=keys
        )

    run = jax.jit(run)
    still, dropped = run(parameters, tokens, actions, None), run(parameters, tokens, actions, keys)
    assert float(still.cross_entropy) != float(dropped.cross_entropy) and still.reward is not None
    alone = [float(run(parameters, tokens[i : i + 1], actions[:1], keys[i : i + 1]).cross_entropy) for i in range(3)]
    np.testing.assert_allclose(np.mean(alone), dropped.cross_entropy, rtol=1e-5)


# Configurations.


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (TOKENIZER.replace(resolution=15), "resolution = 15: must be a multiple of 2"),
        (TOKENIZER.replace(patch=3), "patch = 3: must divide .* 8"),
        (TOKENIZER.replace(attention_side=4), "attention_side = 4"),
        (TOKENIZER.replace(attention_groups=3), "attention_groups = 3"),
        (TOKENIZER.replace(context_frames=0), "context_frames = 0"),
        (TOKENIZER.replace(dropout=1.0), "dropout = 1.0"),
        (TINY.replace(width=20), "width = 20: must be a multiple of 2 x heads = 6"),
        (TINY.replace(action_width=-1), "action_width = -1"),
        (TINY.replace(action_width=0, action_reconstruction=True), "action_width = 0, but action_reconstruction"),
        (TINY.replace(action_width=0, action_everywhere=True), "action_width = 0, but action_everywhere"),
        (TINY.replace(attention_dropout=1.0), "attention_dropout = 1.0"),
    ],
)
def test_bad_configs(config, words):
    with pytest.raises(ConfigError, match=words):
        validate_tree(config)


def test_networks_that_do_not_belong_together():
    TINY.replace(max_positions=134).check_tokenizer(TOKENIZER, 3)
    with pytest.raises(ValueError, match="vocabulary = 33, .* 18 \\+ 12 codes .* Set it to 32"):
        TINY.replace(vocabulary=33).check_tokenizer(TOKENIZER, 3)
    with pytest.raises(ValueError, match="3 frames are 134 tokens, more than transformer.max_positions = 64"):
        TINY.check_tokenizer(TOKENIZER, 3)
    with pytest.raises(ValueError, match="2 frames with 2 context frames: no frame to predict"):
        TINY.check_tokenizer(TOKENIZER, 2)


def test_sites_of_the_released_tokenizers():
    small, large = CompressiveTokenizerConfig.released_64(), CompressiveTokenizerConfig.released_256()
    assert small.encoder_sites() == ((1, 16), (2, 16)) and small.decoder_sites() == ((-1, 16),)
    assert large.encoder_sites() == ((2, 32), (3, 16), (4, 16)) and large.decoder_sites() == ((-1, 16), (0, 32))


def test_flops_agree_with_the_compiler(monkeypatch):
    # The compiler counts the body of a kernel's loop once.
    monkeypatch.setattr(front, "choose", lambda *_, **__: front.Choice(front.AttentionKernel.REFERENCE, "to count"))
    config = dataclasses.replace(TINY, width=96, hidden=256, heads=3, unroll=True, attention_dropout=0.0)
    network = Network.of(lambda rngs: FrameTransformer(config, rngs=rngs))
    tokens = jax.ShapeDtypeStruct((1, LAYOUT.length), jnp.int32)
    actions = jax.ShapeDtypeStruct((1, 3, 2), jnp.float32)

    def run(p, tokens, actions):
        return loss_terms(network.bind(p), tokens, LAYOUT, actions=actions).cross_entropy

    counted = jax.jit(run).lower(network.shapes, tokens, actions).cost_analysis()["flops"]
    assert sum(flops.forward(config, LAYOUT).values()) == pytest.approx(counted, rel=0.06)

    # Large, because padding counts in our FLOPs and not in the compiler's.
    tokenizer = TOKENIZER.replace(block_channels=(32, 64), groups=8, code_width=16, resolution=64, attention_side=32)
    network = Network.of(lambda rngs: CompressiveTokenizer(tokenizer, rngs=rngs))
    video = jax.ShapeDtypeStruct((1, 4, 64, 64, 3), jnp.float32)
    counted = jax.jit(lambda p, x: network.apply(p, x)[:2]).lower(network.shapes, video).cost_analysis()["flops"]
    assert sum(flops.reconstruct(tokenizer, 4).values()) == pytest.approx(counted, rel=0.06)
