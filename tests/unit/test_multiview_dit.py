"""The multi-view transformer: separate clips at initialization, then views that attend to each other as configured."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.geometry import paths, rotations
from jvgen.geometry.cameras import Cameras, inverse
from jvgen.geometry.epipolar import EpipolarBias, epipolar_bias, random_normals
from jvgen.interop.from_torch import import_folder
from jvgen.interop.to_torch import export_network
from jvgen.models.multiview.config import MultiViewDiTConfig, SyncConfig
from jvgen.models.multiview.flops import forward_flops
from jvgen.models.multiview.model import MultiViewDiT, MultiViewModules
from jvgen.models.multiview.synchronization import SyncMode, ViewLayout
from jvgen.models.multiview.view_conditioning import (
    ViewConditioning,
    camera_band,
    camera_conditioning,
    homography_band,
    ray_patches,
    token_cameras,
)
from jvgen.models.video_dit.config import AggregationConfig, Positions
from jvgen.models.video_dit.model import VideoDiT
from jvgen.nested import flatten, unflatten
from jvgen.nn.network import Network
from jvgen.nn.stacked import Remat
from tests import quick_xla

pytestmark = pytest.mark.usefixtures("quick_compilations")

SYNC = SyncConfig(every=2, groups=4)
TINY = MultiViewDiTConfig(
    layers=4,
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
    temporal_compression=4,
    positions=Positions.ROTARY,
    token_multiple=8,
    zero_init=False,
    sync=SYNC,
)
SHAPE, GRID, SIZE, FRAMES = (2, 4, 6), (2, 3), (32, 48), 5  # 8 pixels and 4 frames a latent, patches of 2 x 2


@functools.cache
def network_of(config: MultiViewDiTConfig) -> Network:
    return Network.of(lambda rngs: MultiViewDiT(config, rngs=rngs))


def random_parameters(network: Network, *, sync: bool = True) -> dict:
    """Random numbers everywhere, or everywhere but in what starts at zero."""
    rng, flat = np.random.default_rng(0), {}
    for path, shape in flatten(network.shapes).items():
        values = 0.2 * rng.standard_normal(shape.shape).astype(np.float32)
        if not sync and path.startswith(("views/sync/layers/output", "views/rays", "views/adapter")):
            values = np.zeros_like(values)
        flat[path] = jnp.asarray(values + 1.0 if path.endswith("norm/scale") else values)
    return unflatten(flat)


def cameras_of(views: int, examples: int = 1) -> Cameras:
    extrinsics = paths.named_paths("circle", views, FRAMES, distance=1.0)
    intrinsics = paths.default_intrinsics(views, FRAMES, SIZE[1] / SIZE[0])
    return Cameras(*(jnp.float32(np.broadcast_to(part, (examples, *part.shape))) for part in (intrinsics, extrinsics)))


def views_of(views: int, partner, copies: int = 1, examples: int = 1, sync: SyncConfig = SYNC) -> ViewConditioning:
    cameras, partner = cameras_of(views, examples), jnp.asarray(partner, jnp.int32)
    normals = random_normals(jax.random.key(0), (examples, views, SHAPE[0]))
    return ViewConditioning(
        ViewLayout(views, copies),
        partner,
        camera_band(token_cameras(cameras, 4), partner, sync, normals, grid=GRID, size=SIZE),
        ray_patches(cameras, 4, grid=SHAPE[1:], size=SIZE),
    )


def inputs_of(rows: int, dtype=jnp.float32) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(1)
    latents = jnp.asarray(rng.standard_normal((rows, *SHAPE, 4)), dtype)
    text = jnp.asarray(rng.standard_normal((rows, 3, 12)), dtype)
    return latents, text, jnp.asarray(rng.uniform(0, 999, rows), jnp.float32)


@functools.cache
def program_of(config, make_views):
    """One per network and `make_views`, which builds the conditioning within the traced program, as tasks do."""

    @functools.partial(jax.jit, compiler_options=quick_xla.FUSION_EMITTERS)
    def apply(parameters, *inputs):
        return network_of(config).apply(parameters, *inputs, views=None if make_views is None else make_views())

    return apply


def run(config, parameters, inputs, make_views=None):
    return np.asarray(program_of(config, make_views)(parameters, *inputs))


def pair() -> ViewConditioning:
    return views_of(2, [1, 0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_at_first_views_are_separate_clips(dtype):
    """Bit for bit, next to the same clips in the plain network; alone, XLA multiplies one row otherwise than three."""
    parameters = random_parameters(network_of(TINY), sync=False)
    parameters = jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim > 2 else leaf, parameters)
    inputs = inputs_of(3, dtype)
    made = run(TINY, parameters, inputs, lambda: views_of(3, [1, 2, 0]))
    plain = Network.of(lambda rngs: VideoDiT(TINY.plain, rngs=rngs))
    own = {name: value for name, value in parameters.items() if name != "views"}
    apply = jax.jit(plain.apply, compiler_options=quick_xla.FUSION_EMITTERS)
    np.testing.assert_array_equal(made, apply(own, *inputs))
    alone = [apply(own, *(array[row : row + 1] for array in inputs))[0] for row in range(3)]
    np.testing.assert_allclose(made, np.stack(alone), atol=1e-5 if dtype == jnp.float32 else 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", [{"unroll": True, "token_multiple": 1}, {"remat": Remat.FULL}], ids=["unroll", "remat"]
)
def test_unrolling_and_remat_do_not_change_gradients(change):
    parameters, inputs = random_parameters(network_of(TINY)), inputs_of(2)

    def output_and_gradient(config):
        @jax.jit
        def both(parameters):
            def loss(parameters):
                output = network_of(config).apply(parameters, *inputs, views=pair())
                return jnp.mean(jnp.square(output)), output

            (_, output), gradient = jax.value_and_grad(loss, has_aux=True)(parameters)
            return output, gradient["views"]["sync"]["layers"]["block"]["attentions"]["0"]["query"]["kernel"]

        return both(parameters)

    for ours, theirs in zip(output_and_gradient(TINY.replace(**change)), output_and_gradient(TINY), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max(), rtol=0)


def test_unrolling_does_not_change_the_output():
    parameters, inputs = random_parameters(network_of(TINY)), inputs_of(2)
    expected = run(TINY, parameters, inputs, pair)
    unrolled = run(TINY.replace(unroll=True, token_multiple=1), parameters, inputs, pair)
    np.testing.assert_allclose(unrolled, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


def test_aggregation_includes_the_modules():
    """RepVideo's mean of earlier layers, with modules that add nothing: what `VideoDiT` computes by its own means."""
    config = TINY.replace(aggregation=AggregationConfig(period=2))
    network = network_of(config)
    parameters = random_parameters(network, sync=False)
    inputs = inputs_of(2)
    made = run(config, parameters, inputs, pair)
    np.testing.assert_allclose(made, run(config, parameters, inputs), atol=2e-5 * np.abs(made).max(), rtol=0)
    assert np.abs(made - run(TINY, {k: v for k, v in parameters.items() if k != "aggregation"}, inputs)).max() > 1e-3
    random = random_parameters(network)
    synchronized = run(config, random, inputs, pair)
    assert np.isfinite(synchronized).all() and np.abs(synchronized - run(config, random, inputs)).max() > 1e-3


@pytest.mark.parametrize("mode", list(SyncMode))
def test_views_attend_to_their_partners(mode):
    config = TINY.replace(sync=SYNC.replace(mode=mode))
    parameters, inputs = random_parameters(network_of(config)), inputs_of(4)
    make = functools.partial(views_of, 4, [1, 0, 3, 2], sync=config.sync)
    made = run(config, parameters, inputs, make)
    changed = run(config, parameters, (inputs[0].at[3].add(1.0), *inputs[1:]), make)
    moved = np.abs(changed - made).reshape(4, -1).max(axis=1) > 1e-4
    np.testing.assert_array_equal(moved, [True] * 4 if mode is SyncMode.JOINT else [False, False, True, True])


def test_copies_for_guidance_are_independent():
    parameters, (latents, text, timesteps) = random_parameters(network_of(TINY)), inputs_of(2)
    doubled = (jnp.repeat(latents, 2, axis=0), jnp.repeat(text, 2, axis=0), jnp.repeat(timesteps, 2))
    both = run(TINY, parameters, doubled, lambda: views_of(2, [1, 0], copies=2))
    alone = run(TINY, parameters, (latents, text, timesteps), pair)
    np.testing.assert_allclose(both.reshape(2, 2, *alone.shape[1:]), np.stack([alone] * 2, axis=1), atol=2e-5)
    with pytest.raises(ValueError, match="3 clips are not examples of 2 views, 1 times; give a multiple"):
        run(TINY, parameters, inputs_of(3), pair)


def test_rays_change_the_output_and_are_optional():
    parameters, inputs = random_parameters(network_of(TINY)), inputs_of(2)
    made = run(TINY, parameters, inputs, pair)

    def without() -> ViewConditioning:
        return dataclasses.replace(pair(), rays=None)

    assert np.abs(run(TINY, parameters, inputs, without) - made).max() > 1e-3


# View conditioning ---------------------------------------------------------------------------------------------------


def test_a_latent_frame_has_the_camera_of_its_last_frame():
    cameras = cameras_of(2)
    kept = token_cameras(cameras, 4)
    np.testing.assert_array_equal(kept.extrinsics, cameras.extrinsics[:, :, [0, 4]])
    np.testing.assert_array_equal(token_cameras(cameras, 1, temporal_patch=5).extrinsics, cameras.extrinsics[:, :, [4]])


def test_ray_patches_cover_every_frame():
    made = np.asarray(jax.jit(lambda: ray_patches(cameras_of(2), 4, grid=SHAPE[1:], size=SIZE))()).reshape(
        2, 2, 4, 6, 4, 6
    )
    first = made[:, 0]
    np.testing.assert_array_equal(first, np.repeat(first[..., :1, :], 4, axis=-2))
    # The first cameras are the origin of the world: no moments. Later ones are apart from each other.
    assert np.abs(first[..., :3]).max() == 0
    assert (np.abs(np.diff(made[:, 1], axis=-2)).max(axis=(1, 2, 4)) > 1e-3).all()


@pytest.mark.parametrize("without", ["pseudo", "open"])
def test_bands_of_cameras_with_a_common_center(without):
    sync = SYNC.replace(without_baseline=without, bias=EpipolarBias.ABSOLUTE, band=1.0)
    made = np.asarray(jax.jit(lambda: epipolar_bias(views_of(2, [1, 0], sync=sync).band))())
    assert made.shape == (2, 2, 6, 6)
    own = np.diagonal(made[:, 0], axis1=-2, axis2=-1)
    assert (own == 0).all() and ((made[:, 0] == 0).all() == (without == "open"))
    assert (made[:, 1] < 0).any(axis=(1, 2)).all()


def test_cameras_that_turn_about_one_place_have_no_lines():
    """Anywhere in their world: relative to one of them, float32 leaves distances of 1e-6 that are no baseline."""
    turns = rotations.exponential(np.random.default_rng(0).normal(size=(1, 2, FRAMES, 3)))
    center = np.broadcast_to(np.array([3.0, -20.0, 5.0])[:, None], (1, 2, FRAMES, 3, 1))
    extrinsics = inverse(np.concatenate([turns, center], axis=-1))
    cameras = Cameras(cameras_of(2).intrinsics, jnp.float32(extrinsics))
    config = TINY.replace(sync=SYNC.replace(without_baseline="open"))
    conditioning = camera_conditioning(
        config, cameras, jnp.asarray([1, 0]), jax.random.split(jax.random.key(0), 1), (2, *SHAPE, 4),
        frames_per_latent=4, pixels_per_latent=8,
    )  # fmt: skip
    assert (np.asarray(conditioning.band.lines) == 0).all()


def test_one_wrong_camera_leaves_the_lines_of_the_others():
    extrinsics = paths.named_paths("circle", 2, 9)[None].astype(np.float32)
    extrinsics[0, 1, -1, :, 3] += 1e7
    cameras = Cameras(jnp.float32(paths.default_intrinsics(2, 9, SIZE[1] / SIZE[0]))[None], jnp.asarray(extrinsics))
    config = TINY.replace(sync=SYNC.replace(without_baseline="open"))
    conditioning = camera_conditioning(
        config, cameras, jnp.asarray([1, 0]), jax.random.split(jax.random.key(0), 1), (2, 3, *SHAPE[1:], 4),
        frames_per_latent=4, pixels_per_latent=8,
    )  # fmt: skip
    assert [bool((line == 0).all()) for line in np.asarray(conditioning.band.lines)[0]] == [True, False, False]


def test_homography_bands_follow_the_warp():
    """A shift by a token to the right: a column is looked for in the next one, on the way back in the one before."""
    shift = np.eye(3, dtype=np.float32)
    shift[0, 2] = 16.0
    matrices = jnp.asarray(np.stack([np.eye(3, dtype=np.float32), shift]))[None]
    upright = jnp.broadcast_to(jnp.float32([1.0, 0.0]), (1, 2, 2, 2))
    sync = SYNC.replace(bias=EpipolarBias.ABSOLUTE, band=1.0)
    made = np.asarray(epipolar_bias(homography_band(matrices, sync, upright, grid=GRID, size=SIZE))).reshape(
        2, 2, 2, 3, 2, 3
    )
    free = (made == 0).all(axis=(2, 4))
    np.testing.assert_array_equal(free[:, 0], [np.eye(3)] * 2)
    np.testing.assert_array_equal(free[:, 1], [np.eye(3, k=1), np.eye(3, k=-1)])


def test_flops_agree_with_the_compiler():
    config = TINY.replace(
        heads=8, head_width=32, unroll=True, condition_width=64, temporal_compression=4, token_multiple=1
    )  # no padding, which the compiler counts
    config = config.replace(sync=SYNC.replace(mode=SyncMode.JOINT))
    network = network_of(config)
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, *SHAPE, 4), (2, 3, 12), (2,))]
    lowered = jax.jit(lambda p, *inputs: network.apply(p, *inputs, views=views_of(2, [1, 0]))).lower(
        network.shapes, *shapes
    )
    parts = forward_flops(config, SHAPE, 2)
    assert 2 * sum(parts.values()) == pytest.approx(lowered.cost_analysis()["flops"], rel=0.04)
    assert parts["synchronization"] > 0 and parts["rays"] > 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sync": SyncConfig(every=3)}, "sync.every = 3: must divide layers = 4; take 2"),
        ({"sync": SyncConfig(every=1, groups=5)}, "sync.groups = 5: must divide heads x head_width = 32"),
        ({"sync": SyncConfig(every=1, groups=4, heads=3)}, "sync.heads = 3: must divide"),
    ],
)
def test_invalid_configs_are_rejected(change, message):
    with pytest.raises(ValueError, match=message):
        TINY.replace(**change).validate()
    with pytest.raises(ValueError, match="band = 0.0: must be positive"):
        SyncConfig(band=0.0).validate()


# Multi-view modules --------------------------------------------------------------------------------------------------


def test_modules_are_exported_and_imported(tmp_path):
    """View conditioning trained beside a frozen transformer is exported separately and imported unchanged."""
    config = TINY.replace(adapter_rank=2)
    network = Network.of(lambda rngs: MultiViewModules(config, rngs=rngs))
    parameters = random_parameters(network)
    folder = export_network(config, parameters, tmp_path / "views")
    found, back = import_folder(folder)
    assert found == config
    assert flatten(back).keys() == flatten(parameters).keys()
    assert all(np.array_equal(flatten(back)[path], value) for path, value in flatten(parameters).items())
