"""Representation alignment: its loss, what a step trains with it, where its gradients go, its end, and mistakes."""

import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen import nested
from jvgen.config import ConfigError, validate_tree
from jvgen.interop.to_torch import export_network
from jvgen.losses.alignment import cross_frame_alignment
from jvgen.models.dinov2.config import Dinov2Config
from jvgen.models.dinov2.model import Dinov2
from jvgen.models.video_dit.config import AggregationConfig, VideoDiTConfig
from jvgen.models.video_dit.model import VideoDiT
from jvgen.nn.network import Network
from jvgen.tasks.alignment import AlignmentConfig
from jvgen.training.telemetry.metrics import to_host

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_text_to_video import BUCKET, CONFIG, random_frozen  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilations")

ENCODER = Dinov2Config(width=12, layers=1, heads=2, hidden=24, patch=2, side=4)
ALIGNMENT = AlignmentConfig(encoder=ENCODER, layer=0, weight=0.5, hidden=8)
TWO_LAYERS = CONFIG.replace(denoiser=CONFIG.denoiser.replace(layers=2), alignment=ALIGNMENT, validation_timesteps=0)


def test_cosines_with_frames_nearby_count_less():
    """Hidden states that are the features of their own frames, which are orthogonal: only these count."""
    features = jnp.broadcast_to(jnp.eye(3)[None, :, None], (2, 3, 4, 3))
    for distance in (0, 1, 2, 9):
        loss, similarity = cross_frame_alignment(7.0 * features, features, distance=distance, decay=2.0)
        np.testing.assert_allclose(loss, -1.0, rtol=1e-6)
        np.testing.assert_allclose(similarity, 1.0, rtol=1e-6)
    # Features of a still clip: each frame counts its neighbors, two inside and one at either end.
    still = jnp.broadcast_to(jnp.eye(3)[0], (1, 3, 4, 3))
    near, far = math.exp(-0.5), math.exp(-1.0)
    for distance, total in ((0, 3.0), (1, 3 + 4 * near), (2, 3 + 4 * near + 2 * far)):
        loss, _ = cross_frame_alignment(still, 3.0 * still, distance=distance, decay=2.0)
        np.testing.assert_allclose(loss, -total / 3, rtol=1e-6)
    gradient = jax.grad(lambda wanted: jnp.sum(cross_frame_alignment(still, wanted, distance=1, decay=1.0).loss))
    np.testing.assert_array_equal(gradient(still + 0.1), 0.0)


@pytest.fixture(scope="module")
def parameters():
    rng = np.random.default_rng(0)
    return {
        name: jax.tree.map(lambda leaf: jnp.asarray(0.4 * rng.standard_normal(leaf.shape, np.float32)), network.shapes)
        for name, network in TWO_LAYERS.build().networks.items()
    }


@pytest.fixture(scope="module")
def frozen():
    encoder = jax.jit(Network.of(lambda rngs: Dinov2(ENCODER, rngs=rngs)).init)(jax.random.key(2))
    return random_frozen() | {"image_encoder": encoder}


def batch_of(config, step: int | None = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    arrays = {"slot": np.arange(BUCKET.batch_size, dtype=np.int32)}
    for name, spec in config.build().fields(BUCKET).items():
        shape = (BUCKET.batch_size, *spec.shape)
        floating = spec.dtype == np.float32
        arrays[name] = rng.standard_normal(shape, np.float32) if floating else rng.integers(0, 255, shape, spec.dtype)
    if step is not None:
        arrays["step"] = np.full(BUCKET.batch_size, step, np.int32)
    return {name: jnp.asarray(value) for name, value in arrays.items()}


def test_it_is_part_of_the_training_loss_and_ends(parameters, frozen):
    """A weight that falls to zero; none in an evaluation; other networks begin as they do without it."""
    config = TWO_LAYERS.replace(alignment=ALIGNMENT.replace(decay_steps=10))
    task, plain, key = config.build(), config.replace(alignment=None).build(), jax.random.key(5)
    batch = batch_of(config)
    assert batch["aligned"].shape == (4, 3, 8, 8, 3) and "aligned" not in plain.fields(BUCKET)
    loss = jax.jit(task.loss)
    without = float(jax.jit(plain.loss)(parameters, frozen, batch, key)[0])
    found = {step: loss(parameters, frozen, batch_of(config, step), key) for step in (0, 5, 10, 99)}
    added = {step: float(value) - without for step, (value, _) in found.items()}
    assert abs(added[0]) > 1e-3 and added[5] == pytest.approx(added[0] / 2, rel=1e-3)
    assert added[10] == added[99] == pytest.approx(0.0, abs=1e-6)
    metrics = [to_host(found[step][1]) for step in (0, 99)]
    assert -1 <= metrics[0]["alignment"] <= 1 and not metrics[1].get("alignment", 0) > 0
    evaluated = to_host(jax.jit(task.evaluate)(parameters, frozen, batch_of(config, None), key))
    assert evaluated["loss"] == pytest.approx(without, rel=1e-5) and "alignment" not in evaluated
    starts = [jax.jit(one.init)(jax.random.key(3)) for one in (task, plain)]
    assert set(starts[0]) - set(starts[1]) == {"visual_projection"} and "visual_projection" not in task.network_configs
    for path, value in nested.flatten(starts[1]).items():
        np.testing.assert_array_equal(nested.flatten(starts[0])[path], value, err_msg=path)


def test_its_gradients_reach_the_blocks_up_to_its_layer(parameters, frozen):
    """And the projection, but not the frozen encoder; in clips of pixels the frames are those of the latents."""
    config = TWO_LAYERS.replace(latents="pixels")
    task, batch, key = config.build(), batch_of(config), jax.random.key(5)
    np.testing.assert_array_equal(task.aligned_frames(batch), batch["video"])
    slower = config.replace(temporal_compression=2).build()
    np.testing.assert_array_equal(slower.aligned_frames(batch), batch["video"][:, ::2])

    def aligned(parameters):
        rows = {name: value for name, value in batch.items() if name != "step"}
        return task.loss(parameters, frozen, batch, key)[0] - task.loss(parameters, frozen, rows, key)[0]

    gradient = nested.flatten(jax.jit(jax.grad(aligned))(parameters))
    moved = {path: np.abs(np.asarray(value)) for path, value in gradient.items()}
    first, second = moved["denoiser/blocks/layers/feed_forward/hidden/kernel"]
    assert first.max() > 1e-6 and second.max() < 1e-7
    assert moved["denoiser/output/kernel"].max() < 1e-7
    assert all(value.max() > 0 for path, value in moved.items() if path.startswith("visual_projection/"))
    flops = task.flops(BUCKET)
    assert flops["image_encoder"] > 0 and flops["visual_projection"] > 0


@pytest.mark.parametrize("aggregation", [None, AggregationConfig(period=2, memory_saving=False)])
def test_hidden_states_are_those_of_the_layer(aggregation):
    """Two scans make what one makes; the layer's tokens are those of a network of so many layers."""
    config = VideoDiTConfig(
        layers=3, heads=2, head_width=8, in_channels=4, out_channels=4, text_width=8, text_length=5, condition_width=8,
        aggregation=aggregation, token_multiple=8,
    )  # fmt: skip
    network = Network.of(lambda rngs: VideoDiT(config, rngs=rngs))
    rng = np.random.default_rng(0)

    def drawn(*shape):
        return jnp.asarray(0.4 * rng.standard_normal(shape, np.float32))

    parameters = jax.tree.map(lambda leaf: drawn(*leaf.shape), network.shapes)
    inputs = (drawn(2, 3, 4, 4, 4), drawn(2, 5, 8), jnp.array([3.0, 700.0]))
    run = jax.jit(lambda p, pause: network.apply(p, *inputs, hidden_after=pause), static_argnums=1)
    whole = run(parameters, None)
    for pause in (0, 2):
        output, hidden = run(parameters, pause)
        assert hidden.shape == (2, 3, 4, 16)
        np.testing.assert_allclose(output, whole, atol=1e-5 * np.abs(whole).max())
    module = network.bind(parameters)
    layout = module.layout((3, 4, 4), 5)
    context = module.context(inputs[2], layout)
    tokens = module.run_blocks(module.embed(*inputs[:2], layout), context)
    np.testing.assert_allclose(hidden.reshape(2, 12, 16), tokens[:, 5:17], atol=1e-4 * np.abs(tokens).max())


def test_mistakes(tmp_path, frozen):
    deep = TWO_LAYERS.replace(alignment=ALIGNMENT.replace(layer=2))
    with pytest.raises(ConfigError, match=r"alignment.layer = 2: the last block is 1"):
        validate_tree(deep)
    memory = TWO_LAYERS.denoiser.replace(aggregation=AggregationConfig())
    with pytest.raises(ConfigError, match=r"memory_saving = True: .* set denoiser.aggregation.memory_saving = false"):
        validate_tree(TWO_LAYERS.replace(denoiser=memory))
    with pytest.raises(ValueError, match=r"task.alignment.weights = none: name a local folder of `Dinov2Model`"):
        ALIGNMENT.check_weights()
    export_network(ENCODER.replace(layers=2), jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, np.float32),
        Network.of(lambda rngs: Dinov2(ENCODER.replace(layers=2), rngs=rngs)).shapes,
    ), tmp_path / "deeper")  # fmt: skip
    with pytest.raises(ValueError, match=r"task.alignment.weights = .*\n  layers: 2 in the weights, 1 in the run"):
        ALIGNMENT.replace(weights=str(tmp_path / "deeper")).check_weights()
    export_network(CONFIG.vae, frozen["vae"], tmp_path / "vae")
    with pytest.raises(ValueError, match="a network of ImageVAEConfig in the weights, of Dinov2Config in the run"):
        ALIGNMENT.replace(weights=str(tmp_path / "vae")).check_weights()
    with pytest.raises(ValueError, match=r"task.alignment: the image encoder reads pixels, but .* --keep-clips"):
        TWO_LAYERS.build().preprocess({"latents": np.zeros((3, 4, 4, 8)), "caption": "a"})
