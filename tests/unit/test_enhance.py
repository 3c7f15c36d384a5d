"""Enhance-A-Video: the formula, what shares a factor, and the mistakes that ports of it have made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from jvgen.kernels.frame_diagonal import reference, shifted
from jvgen.models.video_dit.config import AggregationConfig, Positions, VideoDiTConfig
from jvgen.models.video_dit.enhance import OFF, EnhanceConfig, Enhancement, factors_with_mean, shared_mean
from jvgen.models.video_dit.model import TokenLayout, VideoDiT
from jvgen.nested import flatten, unflatten
from jvgen.nn.frame_diagonal import mean_diagonal
from jvgen.nn.network import Network

TINY = VideoDiTConfig(
    layers=3, heads=2, head_width=16, in_channels=4, out_channels=3, text_width=12, text_length=3, condition_width=16,
    sample_height=4, sample_width=6, sample_frames=3, positions=Positions.ROTARY, zero_init=False,
)  # fmt: skip
PUBLISHED = EnhanceConfig(share="batch")


def wave_rows(batch: int, heads: int, frames: int, places: int, width: int, text: int = 0) -> tuple:
    """Queries and keys that other implementations were fed with: waves over the flat index of `B N L D`."""
    shape = (batch, heads, text + frames * places, width)
    index = np.arange(np.prod(shape)).reshape(shape)
    query, key = 2 * np.sin(0.37 * index + 0.1), 2 * np.cos(0.23 * index - 0.2)
    rows = (jnp.asarray(rearrange(array, "b n l d -> b l n d"), jnp.float32) for array in (query, key))
    return *rows, TokenLayout(text=text, grid=(frames, 1, places))


def factor(query, key, layout, config: EnhanceConfig = PUBLISHED, temperature: float = 3.4, **changes) -> np.ndarray:
    strengths = jnp.asarray(config.replace(temperature=temperature).strengths(1))
    return np.asarray(Enhancement(config, strengths, **changes)(query, key, layout, jnp.int32(0)))


def random_rows(batch: int = 4, heads: int = 3, frames: int = 4, places: int = 5, width: int = 8, gain=1.5) -> tuple:
    rng = np.random.default_rng(0)
    shape = (batch, frames * places, heads, width)
    query, key = (jnp.asarray(gain * rng.standard_normal(shape), jnp.float32) for _ in range(2))
    return query, key, TokenLayout(text=0, grid=(frames, 1, places))


# The formula.


@pytest.mark.parametrize(
    "sizes, value",
    [((2, 3, 5, 6, 8), 1.672298976), ((1, 4, 13, 10, 64), 1.261212190), ((2, 3, 5, 6, 8, 7), 1.689429785)],
    ids=["short", "long", "text first"],
)
def test_numbers_of_other_implementations(sizes, value):
    np.testing.assert_allclose(factor(*wave_rows(*sizes)), value, rtol=2e-6)


def test_rows_after_the_video_are_ignored():
    query, key, layout = wave_rows(2, 3, 5, 6, 8, text=7)
    layout = TokenLayout(text=0, grid=layout.grid, padding=7)
    np.testing.assert_allclose(factor(query, key, layout), 1.667360969, rtol=2e-6)


def test_closed_form_is_the_mean_off_the_diagonal():
    query, key, layout = random_rows()
    places = [rearrange(np.asarray(rows, np.float64), "b (f p) n d -> b p n f d", f=4) for rows in (query, key)]
    scores = places[0] @ places[1].swapaxes(-1, -2) / np.sqrt(8)
    attention = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    off_diagonal = attention[..., ~np.eye(4, dtype=bool)].mean(axis=(1, 3))
    np.testing.assert_allclose(
        (1 - mean_diagonal(query, key, frames=4, start=0, stop=layout.valid)) / 3, off_diagonal, atol=1e-6
    )


def test_shifted_keys_give_the_reference():
    rng = np.random.default_rng(5)
    layout = TokenLayout(text=3, grid=(4, 2, 3), padding=2)
    query, key = (jnp.asarray(rng.standard_normal((2, layout.length, 2, 8)), jnp.float32) for _ in range(2))
    video = {"frames": 4, "start": layout.text, "stop": layout.valid}
    expected = reference.summed_diagonal(query, key, **video)
    np.testing.assert_allclose(shifted.summed_diagonal(query, key, **video), expected, rtol=1e-6)
    parts = [shifted.summed_diagonal(query[:, first : first + 10], key, first=first, **video) for first in (0, 10, 20)]
    np.testing.assert_allclose(sum(parts), expected, rtol=1e-6)


@pytest.mark.parametrize("frames, temperature", [(13, 3.4), (4, 4.0)])
def test_uniform_attention_gets_one_and_its_share_of_the_temperature(frames, temperature):
    rows = jnp.zeros((1, frames * 6, 2, 8))
    layout = TokenLayout(text=0, grid=(frames, 2, 3))
    np.testing.assert_allclose(factor(rows, rows, layout, temperature=temperature), 1 + temperature / frames, rtol=1e-6)


def test_frames_that_attend_only_to_themselves_are_not_scaled():
    rows = jnp.tile(30 * jnp.eye(4)[None, :, None, :], (1, 1, 1, 1))
    np.testing.assert_array_equal(factor(rows, rows, TokenLayout(text=0, grid=(4, 1, 1))), 1.0)


def test_factors_exceed_one_below_a_threshold():
    """13 frames and 3.4: a factor above one if and only if frames give themselves less than 4.4 / 16.4."""

    def with_diagonal(share: float) -> tuple:
        # One place: the own score that gives each frame this share among 13.
        own = np.log(share * 12 / (1 - share)) * np.sqrt(13)
        return jnp.eye(13)[None, :, None, :] * own, jnp.eye(13)[None, :, None, :], TokenLayout(text=0, grid=(13, 1, 1))

    assert factor(*with_diagonal(4.4 / 16.4 - 1e-3)) > 1.0
    np.testing.assert_array_equal(factor(*with_diagonal(4.4 / 16.4 + 1e-3)), 1.0)


@pytest.mark.parametrize("temperature", [OFF, -7.0])
@pytest.mark.parametrize("relative", [False, True])
def test_temperatures_without_effect(temperature, relative):
    config = PUBLISHED.replace(relative=relative)
    np.testing.assert_array_equal(factor(*random_rows(), config, temperature), 1.0)
    # Zero is not among them, for frames that look away from themselves.
    query, _, layout = random_rows()
    assert factor(query, -query, layout, temperature=0.0) > 1.0


@pytest.mark.parametrize("share", ["batch", "clip", "sample", "head"])
def test_one_frame_is_the_identity(share):
    rows = jnp.ones((2, 6, 3, 8))
    found = factor(rows, rows, TokenLayout(text=0, grid=(1, 2, 3)), EnhanceConfig(share=share))
    np.testing.assert_array_equal(found, 1.0)


def test_invariance_to_permutations_of_places_heads_samples_and_frames():
    query, key, layout = random_rows()
    base = factor(query, key, layout, temperature=6.0)
    assert base > 1.01

    def moved(rows, axis: str, order) -> jax.Array:
        split = np.asarray(rearrange(rows, "b (f p) n d -> b f p n d", f=4))
        return jnp.asarray(rearrange(split.take(order, axis="bfpn".index(axis)), "b f p n d -> b (f p) n d"))

    for axis, order in {"b": [2, 0, 3, 1], "f": [3, 1, 0, 2], "p": [4, 0, 1, 3, 2], "n": [1, 2, 0]}.items():
        both = factor(moved(query, axis, order), moved(key, axis, order), layout, temperature=6.0)
        np.testing.assert_allclose(both, base, rtol=1e-5)
    alone = factor(query, moved(key, "f", [3, 1, 0, 2]), layout, temperature=6.0)
    assert abs(alone - base) > 1e-4


def test_bfloat16_is_near_float32():
    query, key, layout = random_rows(width=16)
    rounded = factor(query.astype(jnp.bfloat16), key.astype(jnp.bfloat16), layout)
    assert rounded.dtype == np.float32
    np.testing.assert_allclose(rounded, factor(query, key, layout), rtol=1e-2)


# What shares a factor.


def test_what_shares_a_factor():
    values = jnp.arange(12.0).reshape(4, 3)
    np.testing.assert_allclose(shared_mean(values, "head"), values)
    np.testing.assert_allclose(shared_mean(values, "sample"), [[1], [4], [7], [10]])
    np.testing.assert_allclose(shared_mean(values, "clip", 2), [[2.5], [2.5], [8.5], [8.5]])
    np.testing.assert_allclose(shared_mean(values, "batch"), [[5.5]])


def test_halves_of_guidance_are_averaged_before_they_are_clipped():
    """As published for one clip: the mean of the intensities counts, not the mean of the factors."""
    query, _, layout = random_rows(batch=1, gain=6.0)
    weak, strong = (query, query, layout), random_rows(batch=1, gain=0.1)
    both = [jnp.concatenate(pair) for pair in zip(weak[:2], strong[:2], strict=True)]
    of_clip = factor(*both, weak[2], EnhanceConfig(), clip_size=2)
    np.testing.assert_array_equal(of_clip, np.repeat(factor(*both, weak[2]), 2)[:, None])
    apart = [factor(*rows) for rows in (weak, strong)]
    assert apart[0] == 1.0 and abs(np.mean(apart) - of_clip[0, 0]) > 1e-3


def test_a_clip_is_independent_of_its_batch_unless_the_batch_shares():
    query, key, layout = random_rows()
    for share in ("clip", "sample", "head"):
        config = EnhanceConfig(share=share)
        np.testing.assert_allclose(
            factor(query, key, layout, config)[:2], factor(query[:2], key[:2], layout, config), rtol=1e-6
        )
    assert abs(factor(query, key, layout) - factor(query[:2], key[:2], layout)) > 1e-4


@pytest.mark.parametrize("frames", [2, 13, 33])
def test_relative_temperatures_have_the_same_effect_for_any_length(frames):
    rows, layout = jnp.zeros((1, frames, 1, 4)), TokenLayout(text=0, grid=(frames, 1, 1))
    found = factor(rows, rows, layout, PUBLISHED.replace(relative=True), 0.25)
    np.testing.assert_allclose(found, 1.25, rtol=1e-6)


def test_layers_have_their_own_temperatures():
    config = EnhanceConfig(temperature=2.0, layers=(1.0, 0.0, 0.5))
    np.testing.assert_allclose(config.strengths(3), [2.0, OFF, 1.0])
    np.testing.assert_allclose(
        EnhanceConfig(gain=1.2, share="head", layers=(1.0, 0.0, 0.5)).strengths(3), [0.2, 0, 0.1]
    )
    with pytest.raises(ValueError, match="each of the 4"):
        config.strengths(4)


def test_strengths_of_a_config_are_taken_as_they_are_where_the_layer_is_traced():
    query, key, layout = (jnp.ones((1, 4, 2, 4)), jnp.ones((1, 4, 2, 4)), TokenLayout(text=0, grid=(4, 1, 1)))
    config = EnhanceConfig(layers=(1.0, 2.0), temperature=1.0)
    scale = Enhancement(config, config.strengths(2))
    found = [float(jax.jit(lambda layer: scale(query, key, layout, layer))(layer)[0, 0]) for layer in (0, 1)]
    np.testing.assert_allclose(found, [5 / 4, 6 / 4], rtol=1e-6)


def test_the_schedule_of_steps():
    config = EnhanceConfig(start=0.2, end=0.6)
    assert [step for step in range(10) if config.active_in(step, 10)] == [2, 3, 4, 5]
    # 0.14 x 50 is 7.000000000000001 in floating point, 0.58 x 50 is 28.999999999999996.
    hundredths = EnhanceConfig(start=0.14, end=0.58)
    assert [step for step in range(50) if hundredths.active_in(step, 50)] == list(range(7, 29))
    query, key, layout = random_rows(gain=0.1)
    on, off = (factor(query, key, layout, active=jnp.asarray(value)) for value in (True, False))
    np.testing.assert_array_equal(on, factor(query, key, layout))
    np.testing.assert_array_equal(off, 1.0)


# The adaptive temperature.


@pytest.mark.parametrize("mean", [1.0, 1.05, 1.3, 4.0])
def test_the_mean_factor_of_the_heads_is_as_requested(mean):
    intensity = jnp.asarray([[0.3, 0.1, 0.02, 0.2], [0.1, 0.1, 0.1, 0.1], [0.3, 0.0, 0.0, 0.0]])
    found = np.asarray(factors_with_mean(intensity, jnp.float32(mean)))
    np.testing.assert_allclose(found.mean(axis=1), mean, rtol=1e-6)
    assert (found >= 1).all()
    # One temperature a sample: factors above one are in the ratio of the intensities.
    above = found > 1
    for row, values, which in zip(found, intensity, above, strict=True):
        ratio = row[which] / np.asarray(values)[which]
        np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:1], ratio.shape), rtol=1e-5)


def test_adaptive_temperature_of_attention():
    config = EnhanceConfig(share="head", gain=1.15)
    found = factor(*random_rows(heads=6), config)
    assert found.shape == (4, 6) and found.std() > 0.01
    np.testing.assert_allclose(found.mean(axis=1), 1.15, rtol=1e-5)
    # Frames that attend to nothing but themselves have nothing to enhance.
    rows = jnp.tile(60 * jnp.eye(4)[None, :, None, :], (1, 1, 2, 1))
    assert np.isfinite(factor(rows, rows, TokenLayout(text=0, grid=(4, 1, 1)), config)).all()


# In the network.


def random_parameters(config: VideoDiTConfig) -> dict:
    rng, flat = np.random.default_rng(0), {}
    shapes = Network.of(lambda rngs: VideoDiT(config, rngs=rngs)).shapes
    for path, shape in sorted(flatten(shapes).items()):
        start = 1.0 if path.endswith("norm/scale") else 0.4 if path.endswith("gates") else 0.0
        flat[path] = jnp.asarray(start + 0.2 * rng.standard_normal(shape.shape), jnp.float32)
    return unflatten(flat)


def inputs_of(dtype=jnp.float32, frames: int = 3) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(1)
    latents = jnp.asarray(rng.standard_normal((2, frames, 4, 6, 4)), dtype)
    return latents, jnp.asarray(rng.standard_normal((2, 3, 12)), dtype), jnp.asarray([700.0, 3.0], jnp.float32)


@pytest.fixture(scope="module")
def network() -> Network:
    return Network.of(lambda rngs: VideoDiT(TINY, rngs=rngs))


@pytest.fixture(scope="module")
def parameters() -> dict:
    return random_parameters(TINY)


@pytest.fixture(scope="module")
def enhanced(network, parameters):
    """The network with a traced temperature, and how often it was compiled."""
    traced = []

    @jax.jit
    def run(strengths, *inputs):
        traced.append(1)
        return network.apply(parameters, *inputs, attention_scale=Enhancement(PUBLISHED, strengths))

    return run, traced


def test_a_changed_temperature_needs_no_compilation(network, parameters, enhanced):
    run, traced = enhanced
    base = jax.jit(network.apply)(parameters, *inputs_of())
    outputs = [run(jnp.full((3,), value), *inputs_of()) for value in (OFF, 3.4, 8.0)]
    # Another program rounds elsewhere, although every factor is one.
    np.testing.assert_allclose(outputs[0], base, atol=1e-5)
    assert np.abs(outputs[1] - base).max() > 1e-3 and np.abs(outputs[2] - outputs[1]).max() > 1e-3
    assert len(traced) == 1


def test_without_the_hook_the_program_is_unchanged(network, parameters):
    """Off is exact and free: the program is the one that a network without the hook has."""
    frames_alone = "tensor<2x6x2x3x3xf32>"
    texts = [jax.jit(lambda *inputs, hook=hook: network.apply(parameters, *inputs, attention_scale=hook)).lower(
        *inputs_of()).as_text() for hook in (None, Enhancement(PUBLISHED, jnp.ones(3)))]  # fmt: skip
    assert frames_alone not in texts[0] and frames_alone in texts[1]


def test_bfloat16_stays_bfloat16(network, parameters):
    for config in (PUBLISHED, EnhanceConfig(share="head", gain=1.2)):
        hook = Enhancement(config, jnp.full((3,), 3.4))
        apply = lambda *inputs, hook=hook: network.apply(parameters, *inputs, attention_scale=hook)  # noqa: E731
        assert jax.eval_shape(apply, *inputs_of(jnp.bfloat16)).dtype == jnp.bfloat16
        text = jax.jit(apply).lower(*inputs_of(jnp.bfloat16)).as_text()
        # Queries, keys and values stay narrow on their way through attention.
        assert "tensor<2x21x32xbf16>" in text


def test_every_layer_uses_its_own_temperature(network, parameters, enhanced):
    run, _ = enhanced
    outputs = [run(jnp.asarray(strengths), *inputs_of()) for strengths in
               ([9.0, OFF, OFF], [OFF, 9.0, OFF], [OFF, OFF, 9.0], [9.0, 9.0, 9.0])]  # fmt: skip
    for index, output in enumerate(outputs):
        assert all(np.abs(output - other).max() > 1e-4 for other in outputs[:index])


def test_enhancement_with_aggregation():
    config = TINY.replace(aggregation=AggregationConfig(period=2))
    network, parameters = Network.of(lambda rngs: VideoDiT(config, rngs=rngs)), random_parameters(config)
    run = jax.jit(
        lambda strengths: network.apply(parameters, *inputs_of(), attention_scale=Enhancement(PUBLISHED, strengths))
    )
    base = jax.jit(network.apply)(parameters, *inputs_of())
    np.testing.assert_allclose(run(jnp.full((3,), OFF)), base, atol=1e-5)
    assert np.abs(run(jnp.asarray([OFF, OFF, 9.0])) - base).max() > 1e-3


# Mistakes of ports.


def test_frames_are_grouped_by_place_and_not_in_raster_order():
    query, key, layout = wave_rows(2, 3, 5, 6, 8)
    wrong = [rearrange(rows, "b (p f) n d -> b (f p) n d", f=5) for rows in (query, key)]
    np.testing.assert_allclose(factor(*wrong, layout), 1.683640775, rtol=2e-6)
    assert abs(factor(query, key, layout) - 1.683640775) > 1e-2


@pytest.fixture(scope="module")
def first_layer(network, parameters):
    """Queries and keys that the hook of the first layer sees, with and without rotation."""
    latents, text, timesteps = inputs_of()

    def seen_by(config: VideoDiTConfig) -> tuple[jax.Array, jax.Array]:
        seen = []
        model = Network.of(lambda rngs: VideoDiT(config, rngs=rngs)).bind(parameters)
        look = lambda query, key, *_: seen.append((query, key)) or jnp.ones((1, 1))  # noqa: E731
        x = network.bind(parameters).embed(latents, text, layout)
        first_block(network, parameters).attention(x, model.context(timesteps, layout, attention_scale=look))
        return seen[0]

    layout = network.bind(parameters).layout(latents.shape[1:4], 3)
    return seen_by(TINY), seen_by(TINY.replace(positions=Positions.SINCOS)), layout


def first_block(network: Network, parameters: dict):
    blocks = network.bind(parameters).blocks
    return blocks.layer(jax.tree.map(lambda leaf: leaf[0], blocks.variables()))


def test_queries_and_keys_are_taken_after_rotation(first_layer):
    rotated, plain, layout = first_layer
    assert abs(factor(*rotated, layout) - factor(*plain, layout)) > 1e-3


def test_text_is_neither_scaled_nor_scored(network, parameters, first_layer):
    (query, key), _, layout = first_layer
    other = [rows.at[:, : layout.text].set(7.0) for rows in (query, key)]
    np.testing.assert_array_equal(factor(*other, layout), factor(query, key, layout))
    model = network.bind(parameters)
    latents, text, timesteps = inputs_of()
    x = model.embed(latents, text, layout)
    outputs = [
        np.asarray(
            first_block(network, parameters).attention(x, model.context(timesteps, layout, attention_scale=hook))
        )
        for hook in (None, lambda *seen: Enhancement(PUBLISHED, jnp.full((1,), 50.0))(*seen[:3], jnp.int32(0)))
    ]
    expected = factor(query, key, layout, temperature=50.0)
    assert expected > 1.5
    np.testing.assert_array_equal(outputs[1][:, :3], outputs[0][:, :3])
    # After the projection: its bias is scaled too.
    np.testing.assert_allclose(outputs[1][:, 3:], expected * outputs[0][:, 3:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [({"start": 0.6, "end": 0.5}, "start = 0.6"), ({"gain": 0.9, "share": "head"}, "gain = 0.9"),
     ({"gain": 1.1}, "share 'head'")],
)  # fmt: skip
def test_mistakes_in_the_config_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        EnhanceConfig(**changes).validate()
