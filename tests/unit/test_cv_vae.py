"""The causal CV-VAE: inflation is exact, chunks equal the whole clip, no layer reads later frames; configs, files."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.models.cv_vae import flops
from jvgen.models.cv_vae.config import ClipNormConfig, ClipPaddingConfig, CVVAEConfig, TemporalAttentionConfig
from jvgen.models.cv_vae.flat_fields import flatten_fields
from jvgen.models.cv_vae.inflate import inflate
from jvgen.models.cv_vae.model import CVVAE
from jvgen.models.cv_vae.tiling import check_tiles, chunk_bounds, decode_tiled, encode_tiled, tile_starts
from jvgen.models.cv_vae.torch_map import from_diffusers_config, to_diffusers_config, weight_map
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.models.image_vae.model import ImageVAE
from jvgen.nested import flatten, map_with_path
from jvgen.nn.network import Network
from jvgen.saved_config import from_json, to_json

pytestmark = pytest.mark.usefixtures("quick_compilations")

IMAGE = ImageVAEConfig(block_channels=(4, 8, 8), layers_per_block=1, groups=2)
CAUSAL = CVVAEConfig.causal(IMAGE).replace(temporal_attention=TemporalAttentionConfig(kind="causal", window=2))


def network_of(config) -> Network:
    made = CVVAE if isinstance(config, CVVAEConfig) else ImageVAE
    return Network.of(lambda rngs: made(config, rngs=rngs))


def drawn(network: Network, seed: int):
    """Parameters with no zeros among them: starts hide mistakes."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        value = rng.standard_normal(leaf.shape, np.float32)
        if path.endswith("scale"):
            return 1 + 0.2 * value
        return value * (0.2 if leaf.ndim == 1 else math.prod(leaf.shape[:-1]) ** -0.5)

    return map_with_path(draw, network.shapes)


def coders(config, parameters):
    network, parameters = network_of(config), jax.device_put(parameters)
    return tuple(
        functools.partial(jax.jit(functools.partial(network.apply, method=m)), parameters) for m in ("encode", "decode")
    )


def clip_of(frames: int, seed: int = 0, size: tuple[int, int] = (8, 12)) -> jax.Array:
    return jax.random.uniform(jax.random.key(seed), (1, frames, *size, 3), minval=-1, maxval=1)


# Inflation.


@pytest.fixture(scope="module")
def image():
    parameters = drawn(network_of(IMAGE), 0)
    return parameters, coders(IMAGE, parameters)


@pytest.mark.parametrize("frames", [pytest.param(1, marks=pytest.mark.slow), 9])
def test_inflated_network_equals_the_image_autoencoder_on_images_and_clips(image, frames):
    parameters, (encode_image, decode_image) = image
    start = jax.jit(network_of(CAUSAL).init)(jax.random.key(1))
    encode, decode = coders(CAUSAL, inflate(IMAGE, parameters, CAUSAL, start))
    clip = clip_of(frames)
    moments = encode(clip)
    np.testing.assert_allclose(moments[0], encode_image(clip[0])[::4], atol=1e-5)
    latents = moments[..., :4]
    held = decode_image(latents[0])[-(-np.arange(frames) // 4)]
    np.testing.assert_allclose(decode(latents)[0], held, atol=1e-5)


def test_blended_frames_between_latents(image):
    """Images, latents and every fourth frame stay the image autoencoder's; what is between changes evenly."""
    parameters, (encode_image, decode_image) = image
    config = CAUSAL.replace(blend_frames=True)
    start = jax.jit(network_of(config).init)(jax.random.key(1))
    encode, decode = coders(config, inflate(IMAGE, parameters, config, start))
    clip = clip_of(9)
    latents = encode(clip)[..., :4]
    np.testing.assert_allclose(latents[0], encode_image(clip[0])[::4, ..., :4], atol=1e-5)
    images, decoded = decode_image(latents[0]), decode(latents)[0]
    np.testing.assert_allclose(decoded[::4], images, atol=1e-5)
    np.testing.assert_allclose(decode(latents[:, ::-1])[0], decoded[::-1], atol=1e-5)
    np.testing.assert_allclose(
        decode(jnp.repeat(latents[:, 1:2], 3, axis=1))[0], jnp.repeat(images[1:2], 9, axis=0), atol=1e-5
    )
    changes = [float(jnp.abs(decoded[k] - decoded[k - 1]).mean()) for k in range(1, 9)]
    assert min(changes) > 0.1 * float(jnp.abs(images[1] - images[0]).mean())


@pytest.mark.slow
def test_inflated_published_architecture_equals_the_image_autoencoder_on_images(image):
    """Symmetric windows, no quantization convolutions: images inside their outermost pixels, norms as they were."""
    parameters, (encode_image, decode_image) = image
    config = CVVAEConfig.sd21().replace(
        **{name: getattr(IMAGE, name) for name in ("block_channels", "layers_per_block", "groups")},
        time_levels_down=(0,), time_levels_up=(1,), norm=ClipNormConfig(over_clip=True),
        temporal_attention=TemporalAttentionConfig(),
    )  # fmt: skip
    start = jax.jit(network_of(config).init)(jax.random.key(1))
    # Without a bias there, folding the decoder's quantization convolution is exact at the border too.
    parameters = {**parameters, "post_quant": {**parameters["post_quant"], "bias": np.zeros(4, np.float32)}}
    encode, decode = coders(config, inflate(IMAGE, parameters, config, start))
    clip = clip_of(1)
    moments = encode(clip)
    np.testing.assert_allclose(moments[0], encode_image(clip[0]), atol=1e-5)
    _, decode_image = coders(IMAGE, parameters)
    np.testing.assert_allclose(decode(moments[..., :4])[0], decode_image(moments[0, ..., :4]), atol=1e-5)


def test_inflation_refuses_other_sizes(image):
    config = CAUSAL.replace(latent_channels=16, groups=4)
    with pytest.raises(ValueError) as error:
        inflate(IMAGE, image[0], config, network_of(config).shapes)
    assert all(words in str(error.value) for words in ("latent_channels: 4 of the image", "groups: 2")), error.value


# Chunks.


@pytest.fixture(scope="module")
def causal():
    network = network_of(CAUSAL)
    parameters = jax.device_put(drawn(network, 2))
    clip = clip_of(17)
    encode, decode = coders(CAUSAL, parameters)
    moments = encode(clip)
    return network, parameters, clip, moments, decode(moments[..., :4])


def test_chunks_equal_the_whole_clip(causal):
    network, parameters, clip, moments, decoded = causal
    encode, decode = (
        jax.jit(lambda chunk, cache, method=method: network.apply(parameters, chunk, cache, method=method))
        for method in ("encode_chunk", "decode_chunk")
    )
    found, shown, encoder_cache, decoder_cache = [], [], None, None
    for start, stop in [(0, 5), (5, 9), (9, 17)]:
        chunk, encoder_cache = encode(clip[:, start:stop], encoder_cache)
        found.append(chunk)
        frames, decoder_cache = decode(chunk[..., :4], decoder_cache)
        shown.append(frames)
    assert [chunk.shape[1] for chunk in found] == [2, 1, 2] and [chunk.shape[1] for chunk in shown] == [5, 4, 8]
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), moments, atol=1e-5)
    np.testing.assert_allclose(jnp.concatenate(shown, axis=1), decoded, atol=1e-5)
    # The cache does not grow: two frames per convolution, one less than the window of the attention.
    assert {leaf.shape[1] for leaf in jax.tree.leaves((encoder_cache, decoder_cache))} == {1, 2}


def test_no_layer_reads_later_frames(causal):
    network, parameters, clip, moments, decoded = causal
    encode, decode = coders(CAUSAL, parameters)
    later = encode(clip.at[:, 9].add(5.0))
    assert bool(jnp.all(later[:, :3] == moments[:, :3])) and float(jnp.abs(later[:, 3] - moments[:, 3]).max()) > 1e-3
    changed = decode(moments[..., :4].at[:, 3].add(1.0))
    assert (
        bool(jnp.all(changed[:, :9] == decoded[:, :9])) and float(jnp.abs(changed[:, 9] - decoded[:, 9]).max()) > 1e-3
    )


def test_published_networks_refuse_chunks():
    for config in (CVVAEConfig.sd21(), CVVAEConfig.sd3()):
        assert not config.is_causal
        network = network_of(config.replace(block_channels=(4, 4, 4, 4), groups=2, layers_per_block=1))
        with pytest.raises(ValueError, match="reads later frames.*tiling"):
            jax.eval_shape(lambda p, x, n=network: n.apply(p, x, method="encode_chunk"), network.shapes, clip_of(5))


# Sizes.


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 4, 8, 8, 3), ["frames = 4", "must be 4n + 1", "take 1 or 5"]),
        ((1, 18, 8, 8, 3), ["frames = 18", "take 17 or 21"]),
        ((1, 5, 9, 8, 3), ["height = 9", "multiple of 4", "take 8"]),
        ((1, 5, 8, 2, 3), ["width = 2", "take 4"]),
    ],
)
def test_sizes_with_a_remainder_are_refused(shape, words):
    network = network_of(CAUSAL)
    with pytest.raises(ValueError) as error:
        jax.eval_shape(lambda p, x: network.apply(p, x, method="encode"), network.shapes, jnp.zeros(shape))
    assert all(word in str(error.value) for word in words), error.value


def test_lengths():
    config = CVVAEConfig.sd21()
    lengths = {1: 1, 5: 2, 17: 5, 33: 9, 129: 33}
    assert {n: config.latent_frames(n) for n in lengths} == lengths
    assert all(config.pixel_frames(latent) == n for n, latent in lengths.items())
    # What the published code does with other lengths.
    assert [config.latent_frames(n) for n in (2, 4, 6, 18, 20, 22)] == [1, 1, 2, 5, 5, 6]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"groups": 3}, "groups = 3 does not divide 4"),
        ({"time_levels_down": (2,)}, r"time_levels_down = \(2,\): different levels from 0 to 1"),
        ({"time_levels_up": ()}, "equal lengths"),
        ({"padding": ClipPaddingConfig(upsample_time="zeros")}, "upsample_time"),
        ({"mid_attention": False}, "needs mid_attention"),
        ({"padding": ClipPaddingConfig(decoder_time="repeat")}, "needs padding.decoder_time = 'causal'"),
        ({"tile_frames": 6}, "tile_frames = 6: must be a multiple of 4"),
        ({"tile_size": 30}, "tile_size = 30: must be a multiple of 4"),
        ({"tile_overlap": 0.6}, "tile_overlap = 0.6"),
        ({"scaling_factor": 0.0}, "scaling_factor = 0.0"),
    ],
)
def test_mistakes_in_the_config(changes, words):
    with pytest.raises(ValueError, match=words):
        CAUSAL.replace(**changes).validate()


# Chunks and tiles.


def test_chunks_share_a_frame_and_tiles_end_at_the_edge():
    assert chunk_bounds(33, 16) == [(0, 17), (16, 33)]
    assert chunk_bounds(1, 16) == [(0, 1)] and chunk_bounds(18, 16) == [(0, 17), (16, 18)]
    assert chunk_bounds(40, None) == [(0, 40)]
    assert tile_starts(1024, 576, 448) == [0, 448] and tile_starts(1920, 576, 448) == [0, 448, 896, 1344]
    assert tile_starts(576, 576, 448) == [0] and tile_starts(72, 72, 56) == [0]


def test_tiles_of_a_pointwise_coder_equal_the_whole_clip():
    """Coders that look at nothing but their own place: cutting, blending and joining must not be seen."""
    config = CVVAEConfig.sd21().replace(tile_frames=4, tile_size=32, tile_overlap=0.25)

    def encode(clip):
        newest = clip[:, ::4]
        return newest.reshape(*newest.shape[:2], newest.shape[2] // 8, 8, newest.shape[3] // 8, 8, 3).mean((3, 5))

    def decode(latents):
        frames = latents[:, -(-np.arange(4 * (latents.shape[1] - 1) + 1) // 4)]
        return frames.repeat(8, axis=2).repeat(8, axis=3)

    clip = clip_of(13, size=(40, 80))
    latents = encode(clip)
    np.testing.assert_allclose(encode_tiled(encode, clip, config), latents, atol=1e-6)
    np.testing.assert_allclose(decode_tiled(decode, latents, config), decode(latents), atol=1e-6)


def test_tiles_that_do_not_join_are_refused_and_the_advice_joins():
    """Round(57 pixels) is not 7 latents of 8: frames of 480x720 came out as 478x717."""
    published = CVVAEConfig.sd21()
    check_tiles(published, 480, 720)
    check_tiles(published, 1080, 1920)
    for size in (64, 128, 192, 256, 320, 384, 512, 640):
        config = published.replace(tile_size=size)
        check_tiles(config, size, size)
        with pytest.raises(
            ValueError, match=rf"tile_size = {size}, tile_overlap = 0.2222: .* set tile_overlap = "
        ) as e:
            check_tiles(config, 480, size + 8)
        advice = float(str(e.value).split("tile_overlap = ")[-1].rstrip("."))
        check_tiles(config.replace(tile_overlap=advice), 480, size + 8)
    clip = jnp.zeros((1, 1, 40, 72, 3))
    with pytest.raises(ValueError, match="tile_size = 64"):
        encode_tiled(lambda clip: clip, clip, published.replace(tile_size=64))
    with pytest.raises(ValueError, match="frames of 40x72"):
        decode_tiled(lambda latents: latents, clip[:, :, :5, :9], published.replace(tile_size=64))


# Sizes, configs and files.


@pytest.mark.parametrize(
    ("config", "parameters", "tensors", "encode", "decode"),
    [
        (CVVAEConfig.sd21(), 182_446_475, 254, 5.67e12, 17.12e12),
        (CVVAEConfig.sd21().replace(full_3d=True), 255_879_563, 254, 8.57e12, 21.42e12),
        (CVVAEConfig.sd3(), 181_892_515, 244, 5.68e12, 17.11e12),
    ],
    ids=["sd21", "sd21_3d", "sd3"],
)
def test_published_sizes(config, parameters, tensors, encode, decode):
    shapes = network_of(config).shapes
    theirs = weight_map(config).torch_shapes(shapes)
    assert sum(math.prod(shape) for shape in theirs.values()) == parameters and len(theirs) == tensors
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters
    assert sum(flops.encode(config, 17, 256, 256).values()) == pytest.approx(encode, rel=2e-3)
    assert sum(flops.decode(config, 5, 32, 32).values()) == pytest.approx(decode, rel=2e-3)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (CVVAEConfig.sd21(), "CVVAEModel"),
        (
            CVVAEConfig.sd21().replace(block_channels=(32, 32, 64), time_levels_down=(0,), time_levels_up=(1,)),
            "CVVAEModel",
        ),
        (
            CVVAEConfig.sd3().replace(block_channels=(32, 64), groups=8, time_levels_down=(0,), time_levels_up=(0,)),
            "CVVAESD3Model",
        ),
        (CVVAEConfig.causal(), "CVVAE"),
        (CAUSAL, "CVVAE"),
        (CAUSAL.replace(blend_frames=True), "CVVAE"),
        (CVVAEConfig.sd21().replace(groups=16), "CVVAE"),
    ],
)
def test_config_round_trip_through_config_json(config, name):
    values = to_diffusers_config(config)
    assert values["_class_name"] == name
    again = from_diffusers_config(values)
    ignored = {"scaling_factor", "shift_factor"} if name == "CVVAESD3Model" else set()
    assert all(getattr(again, field) == getattr(config, field) for field in vars(config) if field not in ignored)


FLAT = {
    "channels": 3, "latent_channels": 4, "block_channels": (128, 256, 512, 512), "layers_per_block": 2, "groups": 32,
    "mid_attention": True, "quant_convolutions": False, "time_levels_down": (0, 2), "time_levels_up": (0, 2),
    "norm_epsilon": 1e-6, "norm_over": "frame", "border": "zeros", "downsample_sides": "after",
    "decoder_time": "causal", "upsample_time": "causal", "second_convolution": "frame", "temporal_attention": "none",
    "temporal_window": 8, "frames_between": "held", "scaling_factor": 0.18215, "shift_factor": 0.0,
    "tile_frames": 16, "tile_size": 576, "tile_overlap": 0.2222, "sample_size": 256,
}  # fmt: skip
# The configs that version 0.1.0 saved, as changes of FLAT.
SAVED = {
    "sd21": (
        CVVAEConfig.sd21(),
        {"norm_epsilon": 1e-5, "norm_over": "clip", "decoder_time": "zeros", "upsample_time": "repeat",
         "temporal_attention": "replacing"},
    ),
    "sd3": (
        CVVAEConfig.sd3(),
        {"latent_channels": 16, "norm_over": "clip", "border": "repeat", "downsample_sides": "around",
         "decoder_time": "repeat", "upsample_time": "repeat", "scaling_factor": 1.5305, "shift_factor": 0.0609},
    ),
    "causal": (CVVAEConfig.causal(), {"quant_convolutions": True, "tile_frames": None, "tile_size": None}),
    "every value": (
        CVVAEConfig(
            temporal_attention=TemporalAttentionConfig(kind="causal", window=2), full_3d=True, blend_frames=True
        ),
        {"temporal_attention": "added", "temporal_window": 2, "second_convolution": "clip",
         "frames_between": "blended"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAVED)
def test_configs_of_version_0_1_0(name):
    config, changes = SAVED[name]
    flat = FLAT | changes
    assert list(flatten_fields(config).items()) == list(flat.items())
    node = {"class": "jvgen.models.cv_vae.config:CVVAEConfig", **flat, "remat": "none"}
    assert from_json(json.dumps(node)) == config == from_json(to_json(config))


def test_own_config_files_are_flat():
    values = to_diffusers_config(CVVAEConfig.causal())
    assert list(values) == ["_class_name", *FLAT] and values["block_channels"] == [128, 256, 512, 512]
    with pytest.raises(ValueError, match="config.json: norm_over = 'both': must be one of 'frame', 'clip'"):
        from_diffusers_config(values | {"norm_over": "both"})


def test_own_format_round_trip(causal):
    network, parameters, *_ = causal
    table = weight_map(CAUSAL)
    state = dict(table.to_torch(parameters))
    assert state["decoder.mid_block.attentions.0.temporal.to_q.weight"].shape == (8, 8)
    again = flatten(table.from_torch(state, network.shapes))
    assert all(np.array_equal(again[path], value) for path, value in flatten(parameters).items())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"_class_name": "CVVAEModel", "dropout": 0.1}, "dropout = 0.1"),
        ({"_class_name": "CVVAESD3Model", "act_fn": "gelu"}, "act_fn = 'gelu'"),
        ({"_class_name": "CVVAEModel", "causal_decoder": True}, "causal_decoder = True"),
        ({"_class_name": "CVVAE", "depth": 3}, "no field 'depth'"),
    ],
)
def test_files_of_other_networks(values, words):
    with pytest.raises(ValueError, match=words):
        from_diffusers_config(values)
