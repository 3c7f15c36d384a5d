"""RepVideo's aggregation: the numbers of the released rule, its gradients, and what its backward pass stores."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jvgen.models.video_dit import aggregation, aggregation_memory
from jvgen.models.video_dit.aggregation import Aggregation, aggregation_plan
from jvgen.models.video_dit.config import AggregationConfig, GateKind, Positions, VideoDiTConfig
from jvgen.models.video_dit.model import VideoDiT
from jvgen.nested import flatten, unflatten
from jvgen.nn.compute_dtype import cast
from jvgen.nn.network import Network
from jvgen.nn.stacked import Remat, Stacked

# Unrolled layers and gradients are slow to compile, and nothing here depends on how well.
pytestmark = pytest.mark.usefixtures("quick_compilations")

TINY = VideoDiTConfig(
    layers=5, heads=2, head_width=16, in_channels=4, out_channels=3, text_width=12, text_length=3, condition_width=16,
    sample_height=4, sample_width=6, sample_frames=2, positions=Positions.ROTARY, zero_init=False,
    aggregation=AggregationConfig(period=3),
)  # fmt: skip


def network_of(config: VideoDiTConfig) -> Network:
    return Network.of(lambda rngs: VideoDiT(config, rngs=rngs))


def random_parameters(config: VideoDiTConfig) -> dict:
    rng, flat = np.random.default_rng(0), {}
    for path, shape in sorted(flatten(network_of(config).shapes).items()):
        values = 0.2 * rng.standard_normal(shape.shape).astype(np.float32)
        start = 1.0 if path.endswith("norm/scale") else 0.3 if path.endswith("gates") else 0.0
        flat[path] = jnp.asarray(values + np.float32(start))
    return unflatten(flat)


def inputs_of(dtype=jnp.float32) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(1)
    latents = jnp.asarray(rng.standard_normal((2, 2, 4, 6, 4)), dtype)
    return latents, jnp.asarray(rng.standard_normal((2, 3, 12)), dtype), jnp.asarray([700.0, 3.0], jnp.float32)


def cached_layers(model: VideoDiT, tokens: jax.Array, context) -> jax.Array:
    """The rule literally: a list of tokens that is cleared at the start of each group, and its mean."""
    config, gates, variables = model.config, model.aggregation.values(), model.blocks.variables()
    cache, hidden = [tokens], tokens
    for number in range(config.layers):
        mean = jnp.mean(jnp.stack(cache).astype(jnp.float32), axis=0)
        read = gates[number] * mean + (1 - gates[number]) * hidden.astype(jnp.float32)
        hidden = model.blocks.layer(jax.tree.map(lambda leaf, n=number: leaf[n], variables))(
            read.astype(tokens.dtype), context
        )
        cache = [hidden] if number % config.aggregation.period == 0 else [*cache, hidden]
    return hidden


def forward(network: Network, parameters: dict, inputs: tuple, layers=VideoDiT.run_blocks) -> jax.Array:
    model, (latents, text, timesteps) = network.bind(parameters), inputs
    layout = model.layout(latents.shape[1:4], text.shape[1])
    context = model.context(timesteps, layout)
    return model.head(layers(model, model.embed(latents, text, layout), context), context)


def output_and_gradients(config: VideoDiTConfig, parameters: dict, layers=VideoDiT.run_blocks, dtype=jnp.float32):
    def loss(p: dict) -> tuple[jax.Array, jax.Array]:
        output = forward(network_of(config), p, inputs_of(dtype), layers)
        return jnp.mean(jnp.square(output.astype(jnp.float32))), output

    (_, output), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(parameters)
    return np.asarray(output), {path: np.asarray(value) for path, value in flatten(gradients).items()}


def assert_equal(actual, expected, tolerance: float) -> None:
    np.testing.assert_allclose(actual[0], expected[0], atol=tolerance * np.abs(expected[0]).max(), rtol=0)
    largest = max(np.abs(value).max() for value in expected[1].values())
    for path, value in expected[1].items():
        size = max(np.abs(value).max(), 1e-2 * largest)
        np.testing.assert_allclose(actual[1][path], value, atol=tolerance * size, rtol=0, err_msg=path)


@pytest.fixture(scope="module")
def parameters() -> dict:
    return random_parameters(TINY)


@pytest.fixture(scope="module")
def expected(parameters):
    return output_and_gradients(TINY, parameters, cached_layers)


# The rule alone.


class AddOne(nnx.Module):
    def __init__(self):
        self.bias = nnx.Param(jnp.ones(()), logical_axes=())


def output_of(run_layers, layers: int, gate: float) -> float:
    """The output of `layers` layers for an input of zero when each adds one."""
    blocks = Stacked(lambda rngs: AddOne(), layers, rngs=nnx.Rngs(params=0))
    gates = Aggregation(AggregationConfig(initial=gate), layers=layers, width=1)
    layer = lambda block, number, read, condition, constants: read + block.bias[...]  # noqa: E731
    output = run_layers(blocks, layer, gates.values(), gates.plan(layers), jnp.zeros((1, 1, 1)), (), ())
    return float(output[0, 0, 0])


@pytest.mark.parametrize("module", [aggregation, aggregation_memory], ids=["plain", "memory_saving"])
@pytest.mark.parametrize(
    "layers, gate, value",
    # Of the released code with such blocks: they pin the sign of the gate, the reset and the size of a group.
    [(1, 0.5, 1.0), (3, 0.5, 2.75), (7, 0.5, 4.51771), (8, 0.5, 5.51771), (30, 0.5, 18.26042),
     (30, 0.25, 22.88997), (30, 1.0, 13.08333), (30, 0.0, 30.0)],
)  # fmt: skip
def test_toy_layers_give_the_numbers_of_the_released_code(module, layers, gate, value):
    assert output_of(module.run_layers, layers, gate) == pytest.approx(value, abs=2e-5)


def test_what_is_averaged():
    steps = aggregation_plan(14, 6)
    assert steps.count.tolist() == [1, 1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6, 1]
    assert np.flatnonzero(steps.resets).tolist() == [0, 6, 12]
    # Index 1 is the input of layer 1, which is the output of layer 0.
    assert steps.first.tolist() == [0] + [1] * 6 + [7] * 6 + [13]


@pytest.mark.parametrize("kind, value", [("scalar", 0.7), ("sigmoid", 0.7), ("channel", 0.7), ("scalar", -1.5)])
def test_gates_start_as_configured(kind, value):
    made = Aggregation(AggregationConfig(gate=GateKind(kind), initial=value), layers=4, width=8)
    assert made.gates[...].shape == ((4, 8) if kind == "channel" else (4,))
    np.testing.assert_allclose(made.values(), np.full((4, 8 if kind == "channel" else 1), value), rtol=1e-6)


# In the network.


@pytest.mark.parametrize(
    "change",
    [{}, {"unroll": True}, {"remat": Remat.FULL}, {"remat": Remat.SAVE_ATTENTION}, {"remat": Remat.SAVE_MATMULS}],
    ids=["none", "unrolled", "full", "attention", "matmuls"],
)
def test_output_and_gradients_are_those_of_the_rule(change, parameters, expected):
    assert_equal(output_and_gradients(TINY.replace(**change), parameters), expected, 1e-5)


@pytest.mark.parametrize(
    "change",
    [{}, {"remat": Remat.FULL}, {"aggregation": AggregationConfig(period=2, gate=GateKind.CHANNEL), "layers": 3}],
    ids=["none", "full", "channel"],
)
def test_the_plain_scan_gives_the_same_output_and_gradients(change):
    saving = TINY.replace(**change)
    plain = saving.replace(aggregation=saving.aggregation.replace(memory_saving=False))
    parameters = random_parameters(saving)
    assert_equal(output_and_gradients(saving, parameters), output_and_gradients(plain, parameters), 1e-5)


@pytest.mark.parametrize(
    "config",
    [TINY.replace(layers=3, aggregation=AggregationConfig(period=6, gate=GateKind.SIGMOID)),
     TINY.replace(layers=3, aggregation=AggregationConfig(period=2, gate=GateKind.CHANNEL), token_multiple=8)],
    ids=["sigmoid", "channel"],
)  # fmt: skip
def test_other_gates(config):
    parameters = random_parameters(config)
    ours = output_and_gradients(config, parameters)
    assert_equal(ours, output_and_gradients(config, parameters, cached_layers), 1e-5)
    assert ours[1]["aggregation/gates"].shape == parameters["aggregation"]["gates"].shape


def test_gates_of_layers_that_average_one_thing_have_no_gradient(expected, parameters):
    gradient = output_and_gradients(TINY, parameters)[1]["aggregation/gates"]
    inert = aggregation_plan(TINY.layers, 3).count == 1
    assert inert.tolist() == [True, True, False, False, True]
    np.testing.assert_array_equal(gradient[inert], 0.0)
    assert np.abs(gradient[~inert]).min() > 1e-3


def test_gates_of_zero_are_the_network_without_aggregation_bit_for_bit(parameters):
    plain = {name: value for name, value in parameters.items() if name != "aggregation"}
    closed = parameters | {"aggregation": {"gates": jnp.zeros((TINY.layers,))}}
    apply = jax.jit(network_of(TINY).apply)
    without = jax.jit(network_of(TINY.replace(aggregation=None)).apply)(plain, *inputs_of())
    np.testing.assert_array_equal(apply(closed, *inputs_of()), without)
    assert np.abs(apply(parameters, *inputs_of()) - without).max() > 1e-2


@pytest.mark.parametrize("remat", [Remat.NONE, Remat.SAVE_MATMULS, Remat.SAVE_ATTENTION, Remat.FULL])
def test_no_sum_is_stored_for_the_backward_pass(remat):
    """The backward pass stores no more than without aggregation, and at least one array of tokens per layer."""
    inputs = jax.eval_shape(lambda: inputs_of(jnp.bfloat16))

    def stored(config: VideoDiTConfig) -> int:
        network = network_of(config)
        shapes = jax.eval_shape(lambda p: cast(p, network.axes, jnp.bfloat16), network.shapes)
        pullback = jax.eval_shape(lambda p, i: jax.vjp(lambda p: network.apply(p, *i), p)[1], shapes, inputs)
        # Arrays with an axis of tokens, of which there are 15; the others are negligible.
        leaves = [leaf for leaf in jax.tree.leaves(pullback) if 15 in leaf.shape]
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)

    config = TINY.replace(layers=30, remat=remat)
    plain = stored(config.replace(aggregation=None))
    assert plain >= 30 * 15 * 2 * TINY.width * 2
    assert stored(config) <= plain


def test_bfloat16_is_summed_in_float32(parameters):
    exact, rounded = (output_and_gradients(TINY, parameters, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    assert rounded[0].dtype == jnp.bfloat16
    assert np.abs(rounded[0].astype(np.float32) - exact[0]).max() < 0.06 * np.abs(exact[0]).max()
    text = jax.jit(network_of(TINY).apply).lower(parameters, *inputs_of(jnp.bfloat16)).as_text()
    assert "tensor<2x15x32xf32>" in text


def test_text_rows_are_aggregated_too(parameters):
    def video_alone(model: VideoDiT, tokens: jax.Array, context) -> jax.Array:
        hidden, cache, gates = tokens, [tokens], model.aggregation.values()
        for number in range(TINY.layers):
            read = gates[number] * jnp.mean(jnp.stack(cache), axis=0) + (1 - gates[number]) * hidden
            read = jnp.where(context.is_video[None, :, None], read, hidden)
            variables = jax.tree.map(lambda leaf, n=number: leaf[n], model.blocks.variables())
            hidden = model.blocks.layer(variables)(read, context)
            cache = [hidden] if number % 3 == 0 else [*cache, hidden]
        return hidden

    outputs = [jax.jit(lambda p, f=f: forward(network_of(TINY), p, inputs_of(), f))(parameters)
               for f in (cached_layers, video_alone)]  # fmt: skip
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-2


@pytest.mark.parametrize(
    "config, message",
    [
        (AggregationConfig(period=0), "period = 0"),
        (AggregationConfig(gate=GateKind.SIGMOID, initial=1.0), "initial = 1.0"),
        (TINY.replace(remat=Remat.OFFLOAD), "remat = offload"),
    ],
)
def test_impossible_configurations_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        config.validate()
