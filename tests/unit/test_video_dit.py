"""The denoiser alone: remat, unrolling, padding and rounding do not change its output."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen import saved_config
from jvgen.models.video_dit.config import Positions, VideoDiTConfig, cogvideox1_5_5b, cogvideox_2b, cogvideox_5b
from jvgen.models.video_dit.flops import forward_flops
from jvgen.models.video_dit.model import VideoDiT
from jvgen.nested import flatten, unflatten
from jvgen.nn.network import Network
from jvgen.nn.rope import RotaryGrid
from jvgen.nn.stacked import Remat

TINY = VideoDiTConfig(
    layers=2,
    heads=2,
    head_width=16,
    in_channels=4,
    out_channels=3,
    text_width=12,
    text_length=3,
    condition_width=16,
    sample_height=4,
    sample_width=6,
    sample_frames=2,
    positions=Positions.ROTARY,
    zero_init=False,
)
SHAPE = (2, 4, 6)


def network_of(config: VideoDiTConfig) -> Network:
    return Network.of(lambda rngs: VideoDiT(config, rngs=rngs))


def random_parameters(network: Network) -> dict:
    rng = np.random.default_rng(0)
    flat = {}
    for path, shape in flatten(network.shapes).items():
        values = 0.2 * rng.standard_normal(shape.shape).astype(np.float32)
        flat[path] = jnp.asarray(values + 1.0 if path.endswith("norm/scale") else values)
    return unflatten(flat)


@pytest.fixture(scope="module")
def parameters() -> dict:
    return random_parameters(network_of(TINY))


def inputs_of(dtype=jnp.float32) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(1)
    latents = jnp.asarray(rng.standard_normal((2, *SHAPE, 4)), dtype)
    text = jnp.asarray(rng.standard_normal((2, 3, 12)), dtype)
    return latents, text, jnp.asarray([700.0, 3.0], jnp.float32)


def output_and_gradients(config: VideoDiTConfig, parameters: dict, dtype=jnp.float32):
    network, inputs = network_of(config), inputs_of(dtype)

    def loss(p):
        output = network.apply(p, *inputs).astype(jnp.float32)
        return jnp.mean(jnp.square(output)), output

    (_, output), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(parameters)
    return np.asarray(output), {path: np.asarray(value) for path, value in flatten(gradients).items()}


@pytest.fixture(scope="module")
def expected(parameters):
    return output_and_gradients(TINY, parameters)


def assert_equal(actual, expected, tolerance: float) -> None:
    np.testing.assert_allclose(actual[0], expected[0], atol=tolerance * np.abs(expected[0]).max(), rtol=0)
    largest = max(np.abs(value).max() for value in expected[1].values())
    for path, value in expected[1].items():
        size = max(np.abs(value).max(), 1e-3 * largest)
        np.testing.assert_allclose(actual[1][path], value, atol=tolerance * size, rtol=0, err_msg=path)


@pytest.mark.parametrize(
    "change",
    [{"unroll": True}, {"remat": Remat.FULL}, {"remat": Remat.SAVE_ATTENTION}, {"remat": Remat.SAVE_MATMULS}],
    ids=["unrolled", "full", "attention", "matmuls"],
)
def test_remat_and_unroll_do_not_change_the_result(change, parameters, expected):
    assert_equal(output_and_gradients(TINY.replace(**change), parameters), expected, 1e-5)


def test_rematerialization_stores_less(parameters):
    """The policies must differ in what they save, or they are not applied."""
    saved = {}
    for remat in (Remat.NONE, Remat.SAVE_ATTENTION, Remat.FULL):
        network = network_of(TINY.replace(remat=remat, layers=8))
        shapes = network.shapes
        spec = jax.eval_shape(lambda: inputs_of())

        def residuals(p, inputs, network=network):
            return jax.vjp(lambda p: network.apply(p, *inputs), p)[1]

        leaves = jax.tree.leaves(jax.eval_shape(residuals, shapes, spec))
        saved[remat] = sum(math.prod(leaf.shape) for leaf in leaves)
    assert saved[Remat.FULL] < saved[Remat.SAVE_ATTENTION] < saved[Remat.NONE]


@pytest.mark.parametrize("multiple", [8, 16])
def test_padding_changes_nothing(multiple, parameters, expected):
    config = TINY.replace(token_multiple=multiple)
    layout = network_of(config).apply(parameters, SHAPE, 3, method="layout")
    assert layout.length % multiple == 0 and layout.padding > 0
    assert_equal(output_and_gradients(config, parameters), expected, 1e-5)


@pytest.mark.parametrize("positions", [Positions.SINCOS, Positions.ROTARY])
def test_bfloat16_stays_near_float32(positions, parameters):
    config = TINY.replace(positions=positions)
    exact, rounded = (output_and_gradients(config, parameters, dtype) for dtype in (jnp.float32, jnp.bfloat16))
    assert np.abs(rounded[0] - exact[0]).max() < 0.04 * np.abs(exact[0]).max()
    for path in (
        "blocks/layers/attention/query/kernel",
        "blocks/layers/attention_modulation/vectors/projection/kernel",
    ):
        cosine = (
            np.vdot(exact[1][path], rounded[1][path])
            / np.linalg.norm(exact[1][path])
            / np.linalg.norm(rounded[1][path])
        )
        assert cosine > 0.99, path
    assert all(value.dtype == np.float32 for value in rounded[1].values())


def test_bfloat16_output_has_the_dtype_of_the_input(parameters):
    output = jax.eval_shape(network_of(TINY).apply, parameters, *inputs_of(jnp.bfloat16))
    assert output.dtype == jnp.bfloat16 and output.shape == (2, *SHAPE, 3)


def test_text_and_timestep_reach_the_output(parameters):
    (latents, text, timesteps), apply = inputs_of(), jax.jit(network_of(TINY).apply)
    base = apply(parameters, latents, text, timesteps)
    assert np.abs(apply(parameters, latents, text.at[:, 0].add(1.0), timesteps) - base).max() > 1e-3
    assert np.abs(apply(parameters, latents, text, timesteps + 50.0) - base).max() > 1e-3


def test_attention_scale_applies_to_video_rows_only(parameters):
    """The hook of attention: a factor of one changes nothing, and it sees queries and keys of the whole sequence."""
    network, inputs, seen = network_of(TINY.replace(layers=1, unroll=True)), inputs_of(), []
    one_layer = {**parameters, "blocks": jax.tree.map(lambda leaf: leaf[:1], parameters["blocks"])}

    def scale(query, key, layout, number):
        seen.append((query.shape, layout.text, layout.grid, int(number)))
        return jnp.ones((1, 1))

    base = network.apply(one_layer, *inputs)
    np.testing.assert_array_equal(network.apply(one_layer, *inputs, attention_scale=scale), base)
    assert seen == [((2, 15, 2, 16), 3, (2, 2, 3), 0)]
    doubled = network.apply(one_layer, *inputs, attention_scale=lambda *seen: jnp.full((1, 1), 2.0))
    assert np.abs(doubled - base).max() > 1e-3


def test_attention_scale_includes_the_bias_of_the_projection(parameters):
    network, inputs = network_of(TINY), inputs_of()
    model = network.bind(parameters)
    layout = model.layout(SHAPE, 3)
    block = model.blocks.layer(jax.tree.map(lambda leaf: leaf[0], model.blocks.variables()))
    x = jax.random.normal(jax.random.key(0), (2, layout.length, TINY.width))

    def attended(factor) -> np.ndarray:
        return np.asarray(block.attention(x, model.context(inputs[2], layout, attention_scale=factor)))

    base = attended(None)
    by_sample = np.array([[1.5], [3.0]], np.float32)
    for heads in (1, 2):
        scaled = attended(lambda *seen, n=heads: jnp.asarray(by_sample.repeat(n, axis=1)))
        np.testing.assert_array_equal(scaled[:, :3], base[:, :3])
        np.testing.assert_allclose(scaled[:, 3:], by_sample[:, :, None] * base[:, 3:], rtol=1e-5, atol=1e-6)
    of_heads = jnp.asarray([[2.0, 0.0], [2.0, 0.0]])
    assert np.abs(attended(lambda *seen: of_heads)[:, 3:] - base[:, 3:]).max() > 1e-3


def test_starts_at_zero_and_learns(key):
    """adaLN-zero: the first prediction is zero, and every parameter that can move has a gradient after one step."""
    network = network_of(TINY.replace(zero_init=True))
    parameters, inputs = jax.jit(network.init)(key), inputs_of()

    @jax.jit
    def step(p):
        def loss(p):
            output = network.apply(p, *inputs)
            return jnp.mean(jnp.square(output - 1.0)), output

        (value, output), gradients = jax.value_and_grad(loss, has_aux=True)(p)
        return jax.tree.map(lambda old, gradient: old - 0.3 * gradient, p, gradients), value, output, gradients

    parameters, before, output, _ = step(parameters)
    np.testing.assert_array_equal(output, 0.0)
    for _ in range(3):
        parameters, after, _, gradients = step(parameters)
    assert after < 0.8 * before
    assert all(np.abs(value).max() > 0 for value in flatten(gradients).values())


@pytest.mark.parametrize(
    "preset, count", [(cogvideox_2b, 1_693_783_872), (cogvideox_5b, 5_570_283_072), (cogvideox1_5_5b, 5_570_676_352)]
)
def test_published_sizes(preset, count):
    assert sum(math.prod(shape.shape) for shape in jax.tree.leaves(network_of(preset()).shapes)) == count


@pytest.mark.parametrize("positions", list(Positions))
def test_flops_agree_with_the_compiler(positions):
    """XLA counts single-element work too, which a wide enough network makes small."""
    config = TINY.replace(
        positions=positions, heads=8, head_width=32, condition_width=64, unroll=True, sample_height=8, sample_width=12
    )
    network = network_of(config)
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 2, 8, 12, 4), (1, 3, 12), (1,))]
    counted = jax.jit(network.apply).lower(network.shapes, *shapes).cost_analysis()["flops"]
    assert sum(forward_flops(config, (2, 8, 12)).values()) == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"head_width": 24, "positions": Positions.ROTARY}, "multiple of 16"),
        ({"heads": 0}, "heads = 0"),
        ({"offset_width": 8}, "condition_width = 16"),
        ({"temporal_patch": 2, "positions": Positions.ROTARY_AND_LEARNED}, "temporal_patch"),
    ],
)
def test_impossible_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TINY.replace(**change).validate()


@pytest.mark.parametrize(
    "config, shape, text, message",
    [
        (TINY, (2, 5, 6), 3, "height = 5"),
        (TINY, (2, 4, 7), 3, "width = 7"),
        (TINY.replace(temporal_patch=2), (3, 4, 6), 3, "frames = 3"),
        (TINY, SHAPE, 4, "text_length = 3"),
    ],
)
def test_shapes_that_do_not_divide_are_refused(config, shape, text, message, parameters):
    with pytest.raises(ValueError, match=message):
        network_of(config).apply(parameters, shape, text, method="layout")


def test_grids_larger_than_the_positions_are_refused(parameters):
    config = TINY.replace(rotary_grid=RotaryGrid.SLICE)
    _, text, timesteps = inputs_of()
    with pytest.raises(ValueError, match="sample_height"):
        network_of(config).apply(parameters, jnp.zeros((2, 2, 8, 6, 4)), text, timesteps)


def test_offsets_must_fit_the_configuration(parameters):
    latents, text, timesteps = inputs_of()
    with pytest.raises(ValueError, match="offset_width"):
        network_of(TINY).apply(parameters, latents, text, timesteps, offsets=timesteps)


@pytest.mark.parametrize("saved, policy", [("attention", Remat.SAVE_ATTENTION), ("matmuls", Remat.SAVE_MATMULS)])
def test_remat_policies_saved_by_0_1_0(saved, policy):
    config = saved_config.decode({"class": "jvgen.models.video_dit.config:VideoDiTConfig", "remat": saved})
    assert config.remat is policy
