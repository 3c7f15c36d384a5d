"""Camera geometry of the released CVD and CameraCtrl code: epipolar biases, rays, homographies, folded clips."""

import jax
import jax.numpy as jnp
import numpy as np
from case_fields import check_fields, tensors
from rounding import EPSILON

from jvgen.data.stream.pairs import folded, latent_valid
from jvgen.geometry import homography, paths, plucker
from jvgen.geometry.camera_file import from_rows
from jvgen.geometry.cameras import Cameras, centers, inverse, relative, resized_and_cropped
from jvgen.geometry.epipolar import (
    band,
    distances,
    epipolar_bias,
    epipolar_lines,
    fundamental_of,
    pseudo_lines,
    token_points,
    unit_lines,
)

DIVISOR_EPSILON = 1e-6  # the released code's, everywhere
# Bounds are a rounding of float32 times the numbers that are added up, not times what is left of them. CHAIN is for two
# sums of three products, with factors that were rounded before: fewer than 16 half units.
CHAIN = 8 * EPSILON
NOISE = 64 * np.finfo(np.float64).eps


def serves(name: str, config: dict) -> bool:
    return name.startswith(("epipolar_mask", "plucker", "homography", "re10k_pair_split"))


def run(case) -> None:
    for prefix, compare in (
        ("epipolar_mask", _epipolar),
        ("plucker", _plucker),
        ("homography", _homography),
        ("re10k_pair_split", _pairs),
    ):
        if case.name.startswith(prefix):
            compare(case)


# Epipolar biases -----------------------------------------------------------------------------------------------------


def _epipolar(case) -> None:
    made = case.config
    check_fields(made, "config.json", read=("sub", "pixel_band", "decay_alpha"), about=("nonsquare_8x12",))
    for sub in made["sub"]:
        check_fields(
            sub, f"sub.{sub['name']}", read=("name", "feat", "F_mat_size", "entries_with_pseudo_lines", "rand_slope"),
            about=("kinds", "batch", "max_feat_size"),
        )  # fmt: skip
        read = tensors(case.io, f"{sub['name']}.")
        side, grid, rows = sub["F_mat_size"], (sub["feat"], sub["feat"]), len(read["lines"])
        points = token_points(grid, (side, side), integer_centers=True)
        # Theirs round the size of a cell, its product with the index, the shift and the sum.
        np.testing.assert_allclose(points[None], read["coords"], rtol=0, atol=3 * EPSILON * max(side, 1))
        assert ("slope_uniform" in read) == (sub["rand_slope"] or "F" not in read), f"sub.{sub['name']}.rand_slope"
        angles = np.pi * read["slope_uniform"] if "slope_uniform" in read else np.full(1, -np.pi / 2)
        every = np.broadcast_to(points, (rows, *points.shape))
        through = pseudo_lines(jnp.asarray(every), _normals(np.broadcast_to(angles, rows)))
        lines, sizes, invented = through, _sizes(every), sub["entries_with_pseudo_lines"]
        if "F" in read:
            _fundamental(read)
            # The first frame of every clip has lines through its own points.
            first = np.isin(np.arange(rows), np.arange(rows) if invented == "all" else invented)[:, None, None]
            lines = jnp.where(first, through, epipolar_lines(jnp.asarray(read["F"]), points))
            sizes = np.where(first, sizes, np.abs(points) @ np.swapaxes(np.abs(read["F"]), -1, -2))
        _compare_bias(lines, CHAIN * sizes, grid, side, read, made["pixel_band"], made["decay_alpha"])


def _sizes(points: np.ndarray) -> np.ndarray:
    """Sums of absolute values that lines of any direction through points are at most."""
    one = np.ones(points.shape[:-1])
    return np.stack([one, one, np.abs(points[..., :2]).sum(axis=-1)], axis=-1)


def _normals(angles: np.ndarray) -> jax.Array:
    return jnp.float32(np.stack([np.cos(angles), np.sin(angles)], axis=-1))


def _fundamental(read) -> None:
    # Two cameras at one place have no matrix, only noise.
    apart = np.abs(read["F_float64"]).max(axis=(1, 2)) > 1e-12
    assert apart.any()
    motion, source, target = (read[name][apart] for name in ("T_src_to_tgt", "K_src", "K_tgt"))
    motion, theirs = motion[:, :3], read["F_float64"][apart]
    x, y, z = np.abs(np.moveaxis(motion[..., 3], -1, 0))
    zero = np.zeros_like(x)
    crossed = np.stack([zero, z, y, z, zero, x, y, x, zero], axis=-1).reshape(*x.shape, 3, 3)
    inverses = [np.abs(np.linalg.inv(matrix)) for matrix in (target, source)]
    added = np.swapaxes(inverses[0], -1, -2) @ crossed @ np.abs(motion[..., :3]) @ inverses[1]
    # Where nothing is added up theirs, which turns the translation back and forth, still has noise of float64.
    noise = NOISE * added.max(axis=(1, 2), keepdims=True)
    # Four rounded factors, two of them inverted, in three products.
    single = fundamental_of(jnp.float32(motion), jnp.float32(source), jnp.float32(target))
    _within(single, theirs, 1.5 * CHAIN * added + noise, "F in float32")
    # As for files on the host.
    _within(fundamental_of(motion, source, target), theirs, noise, "F in float64")


def _within(ours, theirs, bound, what: str) -> None:
    """Every difference is at most what rounding allows it."""
    excess = np.abs(np.asarray(ours, np.float64) - theirs) / (bound + 1e-30)
    assert excess.max() <= 1, f"{what}: {excess.max()} times what rounding explains"


def _compare_bias(lines, off, grid, side: int, read, pixel_band: float, decay_alpha: float) -> None:
    """Lines, distances, bands and biases.

    Args:
      lines: of any length.
      off: how far rounding may take the numbers of the lines from theirs.
      grid, side: of the keys.
      read: theirs.
      pixel_band, decay_alpha: width of the band, and magnitude of the bias at twice that width.
    """
    _within(lines, read["lines"], off, "lines")
    unit = jax.jit(lambda lines: unit_lines(lines, epsilon=DIVISOR_EPSILON))(lines)
    made = band(unit, grid, (side, side), width=float(pixel_band), decay=float(decay_alpha), integer_centers=True)
    theirs = np.abs(read["lines"].astype(np.float64))
    normal = np.linalg.norm(theirs[..., :2], axis=-1, keepdims=True) + DIVISOR_EPSILON
    # Points, norms, quotients and sums are rounded too; an error of the normal changes all distances from its line.
    sizes = np.abs(made.points).T
    near = ((off + 2 * CHAIN * theirs) / normal) @ sizes
    near += off[..., :2].sum(axis=-1, keepdims=True) / normal * ((theirs / normal) @ sizes)
    if "distance" in read:
        _within(distances(made.lines, made.points), read["distance"], near, "distance")
    # The width is a share of the largest distance, the slope decay / (width + epsilon), the bias their product.
    width, decay = read["band"].reshape(-1), read["decay"].reshape(-1)
    wide = pixel_band / (side // 2) * near.max(axis=(1, 2)) + CHAIN * width
    steep = decay**2 / decay_alpha * wide + CHAIN * decay
    _within(made.width, width, wide, "band")
    _within(made.slope, decay, steep, "decay")
    allowed = decay[:, None, None] * (near + wide[:, None, None]) + (steep / decay)[:, None, None] * np.abs(
        read["mask"]
    )
    _within(epipolar_bias(made), read["mask"], allowed, "mask")


# Rays ----------------------------------------------------------------------------------------------------------------


def _plucker(case) -> None:
    check_fields(case.config, "config.json", read=("runs",))
    for made in case.config["runs"]:
        where, options = f"runs.{made['name']}", made["args"]
        check_fields(
            made, where, read=("name", "hw", "size", "args"),
            about=("frames", "total", "start", "stride_used", "equal_to_svd_branch_code"),
        )  # fmt: skip
        check_fields(
            options, f"{where}.args", read=("relative_pose", "zero_t_first_frame", "rescale_fxy"),
            about=("sample_stride", "minimum_sample_stride", "shuffle_frames", "use_flip"),
        )  # fmt: skip
        read = tensors(case.io, f"{made['name']}.")
        expected = read.get("plucker_last_axis_cross", read["plucker"])
        track, chosen, size = from_rows(read["pose_rows"]), read["frame_indices"], tuple(made["size"])
        extrinsics, c2w = track.extrinsics[chosen], read["c2w"][0].astype(np.float64)
        if options.get("relative_pose", False):
            poses = _whole(inverse(relative(extrinsics, extrinsics[:1])))
            if not options.get("zero_t_first_frame", False):
                # The first camera is moved along y, by its distance from the origin.
                poses[:, 1, 3] -= np.linalg.norm(inverse(extrinsics)[0, :, 3])
        else:
            poses = _whole(inverse(extrinsics))
        farthest = max(1.0, np.abs(inverse(extrinsics)[..., 3]).max())
        np.testing.assert_allclose(poses, c2w, rtol=0, atol=2 * EPSILON * farthest, err_msg=where)
        intrinsics = track.intrinsics[chosen]
        if options.get("rescale_fxy", False):
            # Theirs leave the center alone: it is right for a crop around it.
            scaled = resized_and_cropped(intrinsics, tuple(made["hw"]), size)
            intrinsics = np.concatenate([scaled[:, :2], intrinsics[:, 2:]], axis=-1)
        height, width = size
        given = read["intrinsics"][0].astype(np.float64) / [width, height, width, height]
        np.testing.assert_allclose(intrinsics, given, rtol=EPSILON, err_msg=where)
        cameras = Cameras(jnp.float32(given), jnp.float32(inverse(c2w[:, :3])))
        rays = np.array(jax.jit(plucker.rays, static_argnums=1)(cameras, size)).transpose(0, 3, 1, 2)
        mirrored = read["flip_flag"].astype(bool)
        rays[mirrored] = rays[mirrored][..., ::-1]
        np.testing.assert_allclose(rays, expected, rtol=0, atol=_rays_off(given, c2w), err_msg=where)


def _rays_off(intrinsics: np.ndarray, c2w: np.ndarray) -> float:
    """How far rounding may take rays: pixels minus the center are divided by the focal length."""
    reach = ((1 + np.abs(intrinsics[..., 2:])) / np.abs(intrinsics[..., :2])).max()
    return CHAIN * (1 + reach) * max(1.0, np.abs(c2w[..., :3, 3]).max())


def _whole(poses: np.ndarray) -> np.ndarray:
    row = np.broadcast_to([[0.0, 0.0, 0.0, 1.0]], (*poses.shape[:-2], 1, 4))
    return np.concatenate([poses, row], axis=-2)


# Homographies --------------------------------------------------------------------------------------------------------


def _homography(case) -> None:
    made, io = case.config, case.io
    about = ("param_order", "params", "matrix", "smallest_abs_third_component_per_entry", "executed_from_reference",
             "not_in_reference", "retyped_rule")  # fmt: skip
    check_fields(made, "config.json", read=("feat", "F_mat_size", "pixel_band", "decay_alpha"), about=about)
    pixels, expected = io["loss_weight.pixel_mask"] > 0, io["loss_weight.latent_mask"][0] > 0
    np.testing.assert_array_equal(latent_valid(pixels, pixels.shape[-1] // expected.shape[-1], 1), expected)
    side, grid = made["F_mat_size"], (made["feat"],) * 2
    points = token_points(grid, (side, side), integer_centers=True)
    there = homography.map_points(
        jnp.asarray(io["H"]), points, (side, side), integer_centers=True, epsilon=DIVISOR_EPSILON
    )
    # A sum of three products over another: little is left of a point near the center, and of the divisor near the
    # horizon.
    center = np.array([(side - 1) / 2, (side - 1) / 2, 0.0])
    added = (np.abs(points) + center) @ np.swapaxes(np.abs(io["H"].astype(np.float64)), -1, -2)
    mapped = (points - center) @ np.swapaxes(io["H"].astype(np.float64), -1, -2)
    divisor = np.abs(mapped[..., 2:] + DIVISOR_EPSILON)
    off = CHAIN * (added + np.abs(mapped) / divisor * added[..., 2:]) / divisor + CHAIN * np.abs(
        io["warped_coords"] + center
    )
    _within(there, io["warped_coords"], off, "warped_coords")
    lines = pseudo_lines(there, _normals(np.pi * io["slope_uniform"]))
    lines_off = CHAIN * _sizes(io["warped_coords"])
    lines_off[..., 2] += off[..., :2].sum(axis=-1)
    _compare_bias(lines, lines_off, grid, side, io, made.get("pixel_band", 3), made.get("decay_alpha", 3))


# Folded clips --------------------------------------------------------------------------------------------------------


def _pairs(case) -> None:
    io = case.io
    check_fields(case.config, "config.json", read=("runs", "two_files"))
    for made in case.config["runs"]:
        about = ("total", "stride", "stride_used", "clip_length", "start")
        check_fields(made, f"runs.{made['name']}", read=("name", "n", "hw", "size", "split"), about=about)
        read = tensors(io, f"{made['name']}.")
        n, size = made["n"], (made["size"],) * 2
        track, chosen = from_rows(read["pose_rows"]), read["frame_indices"]
        intrinsics = resized_and_cropped(track.intrinsics[chosen], tuple(made["hw"]), size)
        order, poses = folded(np.arange(2 * n - 1)), folded(track.extrinsics[chosen])
        np.testing.assert_array_equal(order.reshape(-1), read["fold_indices"])
        poses = relative(poses, poses[:1, :1])
        read["c2w"] = read["c2w"].reshape(-1, 4, 4)
        if made.get("split", 2) != 2:
            steps = np.linspace(0.0, 1.0, made["split"])
            between = [paths.interpolate(first, last, steps) for first, last in zip(*poses, strict=True)]
            shown, at = np.stack(between, axis=1), folded(intrinsics)[:1].repeat(made["split"], axis=0)
        else:
            shown, at = poses, folded(intrinsics)
        _same_poses(shown, read["c2w"])
        _rays_and_matrices(Cameras(at, shown), Cameras(folded(intrinsics), poses), size, read)
    if "two_files" in case.config:
        _two_files(case)


def _same_poses(extrinsics: np.ndarray, c2w: np.ndarray) -> None:
    farthest = max(1.0, np.abs(c2w[..., :3, 3]).max())
    ours = _whole(inverse(extrinsics.reshape(-1, 3, 4)))
    np.testing.assert_allclose(ours, c2w, rtol=0, atol=4 * EPSILON * farthest)


def _two_files(case) -> None:
    """Two files as a pair, with the released code's height and width the wrong way round."""
    check_fields(case.config["two_files"], "two_files", read=("size",), about=("n",))
    read, side = tensors(case.io, "two_files."), case.config["two_files"]["size"]
    tracks = [from_rows(read["pose_rows_0"]), from_rows(read["pose_rows_1"][::-1])]
    poses = np.stack([relative(track.extrinsics, track.extrinsics[:1]) for track in tracks])
    at = np.stack([resized_and_cropped(track.intrinsics, (1280, 720), (side, side)) for track in tracks])
    first = at[:1].repeat(2, axis=0)
    at[0, 0] = at[1, 0]  # the frame that both begin with is the second file's
    read["c2w"] = read["c2w"].reshape(-1, 4, 4)
    _same_poses(poses, read["c2w"])
    # Matrices use the first file's intrinsics for both.
    _rays_and_matrices(Cameras(at, poses), Cameras(first, poses), (side, side), read)


def _rays_and_matrices(shown: Cameras, pair: Cameras, size, read) -> None:
    from jvgen.geometry.epipolar import fundamental_matrices

    flat = Cameras(*(jnp.float32(part.reshape(-1, *part.shape[2:])) for part in shown))
    rays = np.array(plucker.rays(flat, size)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(rays, read["plucker"], rtol=0, atol=_rays_off(shown.intrinsics, read["c2w"]))
    first, second = (Cameras(*(part[i] for part in pair)) for i in range(2))
    ours = np.concatenate([fundamental_matrices(first, second, size), fundamental_matrices(second, first, size)])
    # Theirs are of poses that were rounded to float32: what a baseline is smaller than them is lost.
    apart, farthest = (
        np.abs(part).max() for part in (np.subtract(*centers(pair.extrinsics)), centers(pair.extrinsics))
    )
    largest = np.abs(read["F_mats"]).max()
    np.testing.assert_allclose(ours / largest, read["F_mats"] / largest, atol=CHAIN * (1 + farthest / apart))
    matrix = first.intrinsics[0] * [size[1], size[0], size[1], size[0]]
    np.testing.assert_allclose(matrix, read["K_mats"].reshape(-1, 3, 3)[0][[0, 1, 0, 1], [0, 1, 2, 2]], rtol=1e-9)
