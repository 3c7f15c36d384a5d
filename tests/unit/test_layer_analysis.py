"""Measures of layers on constructed tokens and on small networks, their plots and their table."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jvgen.evaluation.layer_metrics import attention_between, frame_similarity
from jvgen.models.byte_text.config import ByteTextConfig
from jvgen.models.video_dit.config import AggregationConfig, VideoDiTConfig
from jvgen.models.video_dit.model import TokenLayout
from jvgen.nested import map_with_path
from jvgen.runs.analysis import draw, table
from jvgen.tasks.layer_analysis import frame_groups, row_groups
from jvgen.tasks.text import TextConfig
from jvgen.tasks.text_to_video import TextToVideoConfig

pytestmark = pytest.mark.usefixtures("quick_compilations")

DENOISER = VideoDiTConfig(
    layers=4, heads=2, head_width=8, in_channels=4, out_channels=4, text_width=8, text_length=6, condition_width=8,
    token_multiple=8, aggregation=AggregationConfig(period=3),
)  # fmt: skip


def test_similarity_of_still_changing_and_opposite_frames(key):
    still = jnp.broadcast_to(jax.random.normal(key, (1, 5, 8)), (3, 5, 8))
    np.testing.assert_allclose(frame_similarity(still), 1.0, rtol=1e-6)
    np.testing.assert_allclose(frame_similarity(jnp.stack([still[0], -still[0], 3 * still[0]])), [-1, -1], rtol=1e-6)
    apart = jnp.eye(4)[:, None]
    np.testing.assert_allclose(frame_similarity(jnp.stack([apart, apart])), np.zeros((2, 3)), atol=1e-7)
    with pytest.raises(ValueError, match="1 frame"):
        frame_similarity(still[:1])


def test_attention_between_groups_is_that_of_their_rows(key):
    query, key_rows = jax.random.normal(key, (2, 2, 7, 3, 4))
    groups = np.array([0, 0, 1, 1, 1, 2, -1])
    found = np.asarray(attention_between(query, key_rows, groups, 3))
    assert found.shape == (2, 3, 3, 3)
    np.testing.assert_allclose(found.sum(axis=-1), 1.0, rtol=1e-6)
    scores = np.einsum("bqnd,bknd->bnqk", query, key_rows)[..., :6] / 2
    weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    for a in range(3):
        for b in range(3):
            rows, columns = np.flatnonzero(groups == a), np.flatnonzero(groups == b)
            expected = weights[:, :, rows][..., columns].sum(axis=-1).mean(axis=-1)
            np.testing.assert_allclose(found[:, :, a, b], expected, rtol=1e-5)


def test_groups_of_a_sequence():
    layout = TokenLayout(text=2, grid=(2, 1, 3), padding=1)
    assert frame_groups(layout).tolist() == [0, 0, 1, 1, 1, 2, 2, 2, -1]
    assert row_groups(layout).tolist() == [*range(8), -1]
    long = row_groups(TokenLayout(text=10, grid=(10, 10, 10)))
    assert long.max() == 63 and (np.diff(long) >= 0).all() and np.bincount(long).min() >= 15


# A network.


def parameters_of(config: TextToVideoConfig) -> dict:
    rng = np.random.default_rng(0)

    def fill(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        start = 1.0 if path.endswith("norm/scale") else 0.0
        return jnp.asarray(start + 0.3 * rng.standard_normal(leaf.shape), jnp.float32)

    return {name: map_with_path(fill, network.shapes) for name, network in sorted(config.build().networks.items())}


def config_of(denoiser: VideoDiTConfig) -> TextToVideoConfig:
    return TextToVideoConfig(
        denoiser=denoiser, text=TextConfig(encoder=ByteTextConfig(width=8, layers=1, heads=2), length=6),
        temporal_compression=1, spatial_compression=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def measures() -> dict:
    """Of a network with aggregation, and of one without, by name."""
    rng, found = np.random.default_rng(1), {}
    batch = {"latents": jnp.asarray(rng.standard_normal((2, 3, 4, 6, 8)), jnp.float32), "slot": jnp.arange(2),
             "tokens": jnp.asarray(rng.integers(0, 200, (2, 6)), jnp.int32)}  # fmt: skip
    for name, denoiser in {"repvideo": DENOISER, "plain": DENOISER.replace(aggregation=None)}.items():
        config = config_of(denoiser)
        task = config.build()
        look = jax.jit(lambda p, t, task=task: task.analyze_layers(p, {}, batch, jax.random.key(0), t))
        found[name] = jax.tree.map(np.asarray, look(parameters_of(config), jnp.float32(500.0)))
    return found


def test_statistics_of_every_layer(measures):
    found = measures["repvideo"]
    shapes = {name: array.shape for name, array in found.items()}
    similarities = {f"similarity_{name}": (4, 2) for name in ("before", "mean", "read", "after")}
    assert shapes == {**similarities, "intensity": (4, 2), "attention_of_frames": (4, 4, 4),
                      "attention_of_rows": (4, 24, 24)}  # fmt: skip
    # What a layer leaves is what the next finds; layers 0 and 1 average one thing.
    np.testing.assert_array_equal(found["similarity_before"][1:], found["similarity_after"][:-1])
    np.testing.assert_allclose(found["similarity_mean"][:2], found["similarity_before"][:2], atol=1e-6)
    assert np.abs(found["similarity_mean"][2] - found["similarity_before"][2]).max() > 1e-3
    assert np.abs(found["similarity_read"][2] - found["similarity_mean"][2]).max() > 1e-3


def test_hypothetical_means_of_a_network_without_aggregation(measures):
    found = measures["plain"]
    np.testing.assert_array_equal(found["similarity_read"], found["similarity_before"])
    assert np.abs(found["similarity_mean"][3] - found["similarity_before"][3]).max() > 1e-3


def test_plots_and_table(measures, tmp_path):
    found = [(500.0, measures["repvideo"]), (50.0, measures["plain"])]
    written = draw(found, tmp_path)
    stems = ("similarity", "attention_of_frames_t500", "attention_of_rows_t500", "attention_of_frames_t050",
             "attention_of_rows_t050")  # fmt: skip
    assert [path.name for path in written] == [f"{stem}.{ending}" for stem in stems for ending in ("png", "svg")]
    for path in written[::2]:
        pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
        assert len(np.unique(pixels, axis=0)) > 20
    assert table(found).count("\n") == 2 * (2 + 4) - 1
    assert json.dumps({"x": measures["plain"]["intensity"].tolist()})
