"""The synchronization module: what each row depends on, and the maps of released weights."""

import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.geometry.epipolar import Band, EpipolarBias, band, token_points
from jvgen.models.multiview.cvd_checkpoint import CVDCheckpoint, CVDCheckpointConfig
from jvgen.models.multiview.pose_encoder import PoseEncoder, PoseEncoderConfig
from jvgen.models.multiview.synchronization import CrossViewSynchronization, Kernels, SyncMode, ViewLayout
from jvgen.models.multiview.torch_map import cvd_checkpoint_map, pose_encoder_map
from jvgen.nested import flatten, unflatten
from jvgen.nn.network import Network
from jvgen.saved_config import from_json

pytestmark = pytest.mark.usefixtures("quick_compilations")

GRID, SIZE, FRAMES, WIDTH = (3, 4), (24, 32), 2, 16
NETWORK = Network.of(lambda rngs: CrossViewSynchronization(WIDTH, heads=2, groups=4, rngs=rngs))


@pytest.fixture(scope="module")
def parameters() -> dict:
    rng = np.random.default_rng(0)
    flat = {}
    for path, shape in flatten(NETWORK.shapes).items():
        values = 0.3 * rng.standard_normal(shape.shape).astype(np.float32)
        flat[path] = jnp.asarray(values + 1.0 if path.endswith("scale") else values)
    return unflatten(flat)


def tokens_of(rows: int, seed: int = 0) -> jax.Array:
    values = np.random.default_rng(seed).standard_normal((rows, FRAMES, math.prod(GRID), WIDTH))
    return jnp.asarray(values, jnp.float32)


def rows_band(rows: int, form: EpipolarBias = EpipolarBias.SOFT) -> Band:
    """Every token's line is its row of the grid."""
    points = token_points(GRID, SIZE)
    lines = np.stack([np.zeros(len(points)), np.ones(len(points)), -points[:, 1]], axis=-1).astype(np.float32)
    return band(jnp.broadcast_to(lines, (rows, FRAMES, *lines.shape)), GRID, SIZE, form=form)


@functools.cache
def program_of(views, mode):
    @jax.jit
    def apply(parameters, tokens, partner, band):
        return NETWORK.apply(parameters, tokens, views, partner, band, mode=mode)

    return apply


def run(parameters, tokens, partner, views, mode=SyncMode.CROSS, band=None):
    return program_of(views, mode)(parameters, tokens, jnp.asarray(partner, jnp.int32), band)


def test_it_is_the_identity_at_initialization(key):
    fresh, tokens = jax.jit(NETWORK.init)(key), tokens_of(2)
    assert not np.any(fresh["output"]["kernel"]) and not np.any(fresh["output"]["bias"])
    half = run(fresh, tokens.astype(jnp.bfloat16), [1, 0], ViewLayout(2), SyncMode.EPIPOLAR, rows_band(2))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, tokens.astype(jnp.bfloat16))


def test_swapped_videos_have_swapped_outputs(parameters):
    tokens = tokens_of(2)
    made = run(parameters, tokens, [1, 0], ViewLayout(2))
    assert np.abs(made - tokens).max() > 0.1
    np.testing.assert_allclose(run(parameters, tokens[::-1], [1, 0], ViewLayout(2)), made[::-1], atol=1e-5)


def test_a_view_depends_on_its_partner_only(parameters):
    """Two examples of three views, with and without their captions: row (e, v, c) reads (e, partner[v], c)."""
    views, partner = ViewLayout(3, copies=2), [1, 2, 1]
    tokens = tokens_of(12)
    made = np.asarray(run(parameters, tokens, partner, views)).reshape(2, 3, 2, -1)
    changed = tokens.at[3].add(tokens_of(1, seed=1)[0])  # example 0, view 1, copy 1
    other = np.asarray(run(parameters, changed, partner, views)).reshape(2, 3, 2, -1)
    moved = np.abs(other - made).max(axis=-1) > 1e-4
    expected = np.zeros((2, 3, 2), bool)
    expected[0, :, 1] = True  # itself, and the two that look at it
    np.testing.assert_array_equal(moved, expected)


def test_frames_are_independent(parameters):
    tokens = tokens_of(2)
    for mode in SyncMode:
        made = run(parameters, tokens, [1, 0], ViewLayout(2), mode, rows_band(2))
        changed = run(parameters, tokens.at[:, 1].add(1.5), [1, 0], ViewLayout(2), mode, rows_band(2))
        np.testing.assert_allclose(changed[:, 0], made[:, 0], atol=1e-5)


def test_attention_stays_within_a_hard_band(parameters):
    """With a hard band of rows, a token of another row changes nothing but through the norm of its frame."""
    apply = jax.jit(lambda *arrays: NETWORK.bind(parameters).block.attentions[0](
        arrays[0], ViewLayout(2), arrays[1], arrays[2], SyncMode.EPIPOLAR, Kernels()))  # fmt: skip
    tokens, partner = tokens_of(2), jnp.asarray([1, 0])
    for form, leaks in ((EpipolarBias.HARD, False), (EpipolarBias.SOFT, True)):
        made = apply(tokens, partner, rows_band(2, form))
        changed = apply(tokens.at[1, :, 4:8].add(1.0), partner, rows_band(2, form))
        off = np.abs(changed - made)[0].max(axis=(0, 2)).reshape(GRID)
        assert (off[1] > 1e-3).all()
        assert (off[[0, 2]].max() > 1e-7) == leaks, form


def test_joint_attention_ignores_partners(parameters):
    tokens = tokens_of(3)
    made = [run(parameters, tokens, partner, ViewLayout(3), SyncMode.JOINT) for partner in ([1, 2, 0], [2, 0, 1])]
    np.testing.assert_array_equal(*made)
    swapped = run(parameters, tokens[::-1], [1, 2, 0], ViewLayout(3), SyncMode.JOINT)
    np.testing.assert_allclose(swapped, made[0][::-1], atol=1e-5)


def test_the_released_modules():
    """520 tensors, 417,137,600 numbers, and nothing left over in either direction."""
    config = CVDCheckpointConfig()
    network = Network.of(lambda rngs: CVDCheckpoint(config, rngs=rngs))
    shapes = cvd_checkpoint_map(config).torch_shapes(network.shapes)
    assert len(shapes) == 520
    assert sum(math.prod(shape) for shape in shapes.values()) == 417_137_600
    assert shapes["up_blocks.3.epi_modules.2.epi_transformer.transformer_blocks.0.ff.net.0.proj.weight"] == (2560, 320)
    pattern = r"(down|up)_blocks\.[0-3]\.epi_modules\.[0-2]\.epi_transformer\..*\.?(weight|bias)"
    assert all(re.fullmatch(pattern, name) for name in shapes)
    widths = [shape[0] for name, shape in shapes.items() if name.endswith("proj_in.weight")]
    assert {width: widths.count(width) for width in widths} == {320: 5, 640: 5, 1280: 10}


def test_released_weights_round_trip():
    config = CVDCheckpointConfig(channels=(8, 16), heads=2, groups=4)
    network = Network.of(lambda rngs: CVDCheckpoint(config, rngs=rngs))
    table, rng = cvd_checkpoint_map(config), np.random.default_rng(0)
    theirs = {n: rng.standard_normal(s).astype(np.float32) for n, s in table.torch_shapes(network.shapes).items()}
    assert len(theirs) == 26 * 10
    parameters = table.from_torch(theirs, network.shapes)
    back = dict(table.to_torch(parameters))
    assert set(back) == set(theirs)
    assert all(np.array_equal(back[name], theirs[name]) for name in theirs)
    # Any of the modules runs.
    module = network.bind(jax.tree.map(jnp.asarray, parameters)).up[1][2]
    tokens = jnp.asarray(rng.standard_normal((2, 1, 4, 8)), jnp.float32)
    assert jax.jit(lambda x: module(x, ViewLayout(2), jnp.asarray([1, 0])))(tokens).shape == tokens.shape


def test_the_published_pose_encoder():
    config = PoseEncoderConfig()
    network = Network.of(lambda rngs: PoseEncoder(config, rngs=rngs))
    shapes = pose_encoder_map(config).torch_shapes(network.shapes)
    assert sum(math.prod(shape) for shape in shapes.values()) == 199_262_400
    assert shapes["encoder_conv_in.weight"] == (320, 384, 3, 3)
    with pytest.raises(ValueError, match="ray maps of 20x24: both must be multiples of patch = 8"):
        jax.eval_shape(network.apply, network.shapes, jax.ShapeDtypeStruct((1, 2, 20, 24, 6), jnp.float32))
    with pytest.raises(ValueError, match=r"channels = \(20,\): each must be a multiple of 2 x heads = 16"):
        PoseEncoderConfig(channels=(20,)).validate()


@pytest.mark.parametrize("name", ["ReleasedModulesConfig", "jvgen.models.multiview.released:ReleasedModulesConfig"])
def test_saved_configs_of_the_released_modules_load_under_their_new_name(name):
    assert from_json(json.dumps({"class": name, "heads": 4})) == CVDCheckpointConfig(heads=4)


def test_deeper_modules_keep_the_names_of_the_first_block():
    """Saved runs hold the parameters of one block under these names."""
    deep = Network.of(lambda rngs: CrossViewSynchronization(WIDTH, heads=2, groups=4, depth=3, rngs=rngs))
    one, three = flatten(NETWORK.shapes), flatten(deep.shapes)
    assert {path.split("/")[0] for path in one} == {"norm", "input", "block", "output"}
    block = {path.removeprefix("block/"): shape for path, shape in one.items() if path.startswith("block/")}
    added = {f"deeper/{i}/{path}": shape for i in range(2) for path, shape in block.items()}
    assert three == one | added


def test_a_band_per_attention_is_one_for_each(parameters):
    bands = [rows_band(2)] * 3
    with pytest.raises(ValueError, match="band has 3 entries for 1 blocks of 2 attentions each"):
        NETWORK.apply(parameters, tokens_of(2), ViewLayout(2), jnp.array([1, 0]), bands)
