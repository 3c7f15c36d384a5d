"""The released synchronization module (CVD) and pose encoder (CameraCtrl), whole, with their own weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from jvgen.geometry.epipolar import Band, band, epipolar_lines, pseudo_lines, token_points, unit_lines
from jvgen.models.multiview.pose_encoder import PoseEncoder, PoseEncoderConfig
from jvgen.models.multiview.synchronization import CrossViewSynchronization, ViewLayout
from jvgen.models.multiview.torch_map import pose_encoder_map, synchronization_entries
from jvgen.models.weight_map import WeightMap
from jvgen.nn.network import Network

EPSILON = 1e-6


def serves(name: str, config: dict) -> bool:
    return name.startswith(("cvsm_block", "pose_encoder"))


def run(case) -> None:
    _synchronization(case) if case.name.startswith("cvsm_block") else _pose_encoder(case)


def _synchronization(case) -> None:
    made, side = case.config["constructor"], case.config["constructor"]["epi_position_encoding_F_mat_size"]
    sublayers = len(made["attention_block_types"])
    network = Network.of(
        lambda rngs: CrossViewSynchronization(
            made["in_channels"],
            heads=made["num_attention_heads"],
            sublayers=sublayers,
            groups=case.config["norm_groups"],
            rngs=rngs,
        )
    )
    table = WeightMap(
        tuple(synchronization_entries("", "epi_transformer.", sublayers)), ignored=(r".*\.pos_encoder\.coords",)
    )
    parameters = table.from_torch(case.weights, network.shapes)
    for name in case.config["sub"]:
        read = {k.removeprefix(f"{name}."): case.io[k] for k in case.io if k.startswith(f"{name}.")}
        videos, _, frames, height, width = read["x"].shape
        tokens = rearrange(read["x"], "r c f h w -> r f (h w) c")
        bands = [_band(read, layer, (height, width), side) for layer in range(sublayers)]
        for layer, made_band in enumerate(bands):
            if f"mask.{layer}" in read:
                _compare_mask(made_band, read[f"mask.{layer}"])
        views, partner, shared = ViewLayout(videos), np.array([1, 0]), name == "fix_firstframe"
        if "kv_index" in read:
            partner = read["kv_index"][::frames] // frames
        if shared:
            views = ViewLayout(2, copies=2)  # two videos with and without their caption
        apply = jax.jit(functools.partial(network.apply, views=views, share_first_frame=shared))
        output = apply(parameters, tokens, partner=jnp.asarray(partner, jnp.int32), band=bands)
        expected = rearrange(read["output"], "r c f h w -> r f (h w) c")
        np.testing.assert_allclose(output, expected, atol=2e-5, rtol=0, err_msg=name)


def _band(read: dict, layer: int, grid: tuple[int, int], side: int) -> Band:
    """As released: lines of F, but in first frames lines through the own points, all of one direction."""
    points = token_points(grid, (side, side), integer_centers=True)
    lines = epipolar_lines(jnp.asarray(read["F_mats"]), points)
    angle = np.pi * read[f"slope_uniform.{layer}"]
    own = pseudo_lines(jnp.asarray(points)[None], jnp.float32(np.stack([np.cos(angle), np.sin(angle)], axis=-1)))
    lines = lines.at[:, 0].set(own)
    return band(unit_lines(lines, epsilon=EPSILON), grid, (side, side), integer_centers=True)


def _compare_mask(made: Band, mask: np.ndarray) -> None:
    from jvgen.geometry.epipolar import epipolar_bias

    ours = rearrange(epipolar_bias(made), "r f l k -> (r f) l k")
    np.testing.assert_allclose(ours, mask, atol=1e-4 * np.abs(mask).max())


def _pose_encoder(case) -> None:
    made = case.config["constructor"]
    config = PoseEncoderConfig(
        channels=tuple(made["channels"]),
        layers=made["nums_rb"],
        heads=made["temporal_attention_nhead"],
        patch=made["downscale_factor"],
        ray_channels=made["cin"] // made["downscale_factor"] ** 2,
    )
    network = Network.of(lambda rngs: PoseEncoder(config, rngs=rngs))
    parameters = pose_encoder_map(config).from_torch(case.weights, network.shapes)
    features = jax.jit(network.apply)(parameters, rearrange(case.io["x"], "b c f h w -> b f h w c"))
    assert len(features) == len(config.channels)
    for scale, feature in enumerate(features):
        expected = rearrange(case.io[f"feature.{scale}"], "(b f) c h w -> b f h w c", b=feature.shape[0])
        np.testing.assert_allclose(feature, expected, atol=2e-5 * np.abs(expected).max(), rtol=0)
