"""The released synchronization module (CVD) and pose encoder (CameraCtrl), whole, with their own weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from case_fields import check_fields, tensors
from einops import rearrange
from rounding import floor, measured, within_rounding

from jvgen.geometry import homography
from jvgen.geometry.epipolar import Band, band, epipolar_bias, epipolar_lines, pseudo_lines, token_points, unit_lines
from jvgen.models.multiview.pose_encoder import PoseEncoder, PoseEncoderConfig
from jvgen.models.multiview.synchronization import CrossViewSynchronization, SyncMode, ViewLayout
from jvgen.models.multiview.torch_map import pose_encoder_map, synchronization_entries
from jvgen.models.weight_map import WeightMap
from jvgen.nn.network import Network

DIVISOR_EPSILON = 1e-6
CLIP = 16  # frames of a clip in the released code, whatever the clip's are: their first ones have no lines of F
COPIES = 2  # of each video, without and with its caption, where the released code replaces first frames


def serves(name: str, config: dict) -> bool:
    return name.startswith(("cvsm_block", "pose_encoder"))


def run(case) -> None:
    _synchronization(case) if case.name.startswith("cvsm_block") else _pose_encoder(case)


def _synchronization(case) -> None:
    made = case.config["constructor"]
    check_fields(
        case.config, "config.json", read=("constructor", "norm_groups", "sub"), about=("feat",),
        fixed={"processor": "EpiAttnProcessor"},
    )  # fmt: skip
    # Neither context nor scales of activations enter; outputs that begin as zeros were drawn; first frames are fixed
    # in a case of their own.
    about = ("cross_attention_dim", "zero_initialize", "encoder_hidden_states_query", "attention_activation_scale",
             "attention_processor_kwargs", "epi_position_encoding_feat_max_size", "epi_fix_firstframe")  # fmt: skip
    read = ("in_channels", "num_attention_heads", "num_transformer_block", "attention_block_types",
            "epi_position_encoding", "epi_position_encoding_F_mat_size", "epi_no_attention_mask", "epi_rand_slope_ff",
            "rescale_output_factor")  # fmt: skip
    check_fields(made, "constructor", read=read, about=about, fixed={"epi_mono_direction": False})
    sublayers, depth = len(made["attention_block_types"]), made.get("num_transformer_block", 2)
    assert set(made["attention_block_types"]) == {"Epi_Self"}, made["attention_block_types"]
    network = Network.of(
        lambda rngs: CrossViewSynchronization(
            made["in_channels"],
            heads=made["num_attention_heads"],
            sublayers=sublayers,
            depth=depth,
            groups=case.config["norm_groups"],
            rescale=float(made.get("rescale_output_factor", 1.0)),
            rngs=rngs,
        )
    )
    table = WeightMap(
        tuple(synchronization_entries("", "epi_transformer.", sublayers, depth)), ignored=(r".*\.pos_encoder\.coords",)
    )
    parameters = table.from_torch(case.weights, network.shapes)
    for name, sub in case.config["sub"].items():
        check_fields(sub, f"sub.{name}", about=("shape",))
        found = tensors(case.io, f"{name}.")
        _run_synchronization(network, parameters, made, name, found, sublayers * depth)


def _run_synchronization(network, parameters, made: dict, name: str, read: dict, layers: int) -> None:
    rows, _, frames, height, width = read["x"].shape
    tokens = rearrange(read["x"], "r c f h w -> r f (h w) c")
    bands = None
    if made.get("epi_position_encoding", True) and not made.get("epi_no_attention_mask", False):
        bands = [_band(read, layer, (height, width), made) for layer in range(layers)]
        for layer, made_band in enumerate(bands):
            if f"mask.{layer}" in read:
                _compare_mask(made_band, read[f"mask.{layer}"])
    # Every row is a view of its own, or there are pairs of copies.
    shared = made.get("epi_fix_firstframe", False) or name == "fix_firstframe"
    views = ViewLayout(rows // COPIES, copies=COPIES) if shared else ViewLayout(rows)
    # Without indices a half of the batch attends to the other.
    partner = np.roll(np.arange(views.views), views.views // 2)
    if "kv_index" in read:
        assert len(read["kv_index"]) == rows * frames, f"{name}.kv_index: several partners per entry are not supported"
        index = read["kv_index"].reshape(rows, frames)
        np.testing.assert_array_equal(
            index % frames, np.tile(np.arange(frames), (rows, 1)), "frames of one number pair"
        )
        partner = index[:: views.copies, 0] // frames // views.copies
        np.testing.assert_array_equal(index // frames, _rows_of(partner, views)[:, None].repeat(frames, axis=1))
    mode = SyncMode.CROSS if bands is None else SyncMode.EPIPOLAR
    apply = jax.jit(functools.partial(network.apply, views=views, mode=mode, share_first_frame=shared))
    program = functools.partial(apply, partner=jnp.asarray(partner, jnp.int32))
    expected = rearrange(read["output"], "r c f h w -> r f (h w) c")

    def outputs(parameters, tokens, bands):
        return program(parameters, tokens, band=bands)

    ours, moves = measured(outputs, parameters, tokens, bands)
    within_rounding(ours, expected, moves, name)


def _rows_of(partner: np.ndarray, views: ViewLayout) -> np.ndarray:
    return (partner[:, None] * views.copies + np.arange(views.copies)).reshape(-1)


def _band(read: dict, layer: int, grid: tuple[int, int], made: dict) -> Band:
    """As released: lines of F, but in first frames lines through the own points, all of one direction."""
    side = made.get("epi_position_encoding_F_mat_size", 256)
    size, (rows, frames) = (side, side), (len(read["x"]), read["x"].shape[2])
    points = jnp.asarray(token_points(grid, size, integer_centers=True))
    # Horizontal where no direction was drawn.
    normals = jnp.asarray([[0.0, 1.0]], jnp.float32)
    if f"slope_uniform.{layer}" in read:
        angle = np.pi * read[f"slope_uniform.{layer}"]
        normals = jnp.float32(np.stack([np.cos(angle), np.sin(angle)], axis=-1))
    if "H_mats" in read:
        points = homography.map_points(
            jnp.asarray(read["H_mats"]), points, size, integer_centers=True, epsilon=DIVISOR_EPSILON
        ).reshape(rows * frames, -1, 3)
    points = jnp.broadcast_to(points, (rows * frames, *points.shape[-2:]))
    lines = pseudo_lines(points, jnp.broadcast_to(normals, (rows * frames, 2)))
    if "H_mats" not in read and "F_mats" in read:
        of_matrices = epipolar_lines(jnp.asarray(read["F_mats"]), points[0]).reshape(lines.shape)
        first = np.arange(rows * frames) % CLIP == 0
        lines = jnp.where(first[:, None, None], lines, of_matrices)
    lines = lines.reshape(rows, frames, *lines.shape[1:])
    return band(unit_lines(lines, epsilon=DIVISOR_EPSILON), grid, size, integer_centers=True)


def _compare_mask(made: Band, mask: np.ndarray) -> None:
    ours = rearrange(epipolar_bias(made), "r f l k -> (r f) l k")
    np.testing.assert_allclose(ours, mask, atol=1e-4 * np.abs(mask).max())


def _pose_encoder(case) -> None:
    made = case.config["constructor"]
    check_fields(case.config, "config.json", read=("constructor",))
    read = ("channels", "nums_rb", "temporal_attention_nhead", "downscale_factor", "cin")
    released = {"ksize": 1, "sk": True, "use_conv": False, "compression_factor": 1, "rescale_output_factor": 1.0,
                "attention_block_types": ["Temporal_Self"], "temporal_position_encoding": True}  # fmt: skip
    check_fields(made, "constructor", read=read, about=("temporal_position_encoding_max_len",), fixed=released)
    config = PoseEncoderConfig(
        channels=tuple(made["channels"]),
        layers=made["nums_rb"],
        heads=made["temporal_attention_nhead"],
        patch=made["downscale_factor"],
        ray_channels=made["cin"] // made["downscale_factor"] ** 2,
    )
    network = Network.of(lambda rngs: PoseEncoder(config, rngs=rngs))
    parameters = pose_encoder_map(config).from_torch(case.weights, network.shapes)
    apply, clip = jax.jit(network.apply), rearrange(case.io["x"], "b c f h w -> b f h w c")
    features, all_moves = measured(apply, parameters, clip)
    assert len(features) == len(config.channels)
    for scale, (feature, moves) in enumerate(zip(features, all_moves, strict=True)):
        name = f"feature.{scale}"
        expected = rearrange(case.io[name], "(b f) c h w -> b f h w c", b=len(feature))
        within_rounding(feature, expected, moves, name, theirs_off=floor(case.config, name))
