"""Camera geometry of the released CVD and CameraCtrl code: epipolar biases, rays, homographies, folded clips."""

import jax
import jax.numpy as jnp
import numpy as np

from jvgen.data.stream.pairs import folded, latent_valid
from jvgen.geometry import homography, paths, plucker
from jvgen.geometry.camera_file import from_rows
from jvgen.geometry.cameras import Cameras, inverse, relative, resized_and_cropped
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

EPSILON = 1e-6  # the released code's, everywhere
# Tolerances: a rounding of float32 times the numbers that are added up, not times what is left of them. What is
# compared comes out of two sums of three products, a norm and rounded inputs at most: fewer than 16 half units.
ROUNDING = np.finfo(np.float32).eps
CHAIN = 8 * ROUNDING


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
    for sub in case.config["sub"]:
        read = {k.removeprefix(f"{sub['name']}."): case.io[k] for k in case.io if k.startswith(f"{sub['name']}.")}
        side, grid = sub["F_mat_size"], (sub["feat"], sub["feat"])
        points = token_points(grid, (side, side), integer_centers=True)
        np.testing.assert_allclose(points[None], read["coords"], rtol=ROUNDING)
        angles = np.pi * read["slope_uniform"] if "slope_uniform" in read else np.full(1, -np.pi / 2)
        every = np.broadcast_to(points, (sub["batch"] if "batch" in sub else len(read["lines"]), *points.shape))
        normals = _normals(np.broadcast_to(angles, len(every)))
        through, sizes = pseudo_lines(jnp.asarray(every), normals), _sizes(every)
        if "F" in read:
            _fundamental(read)
            # The first frame of every clip of 16 has lines through its own points.
            first = np.arange(len(every)) % 16 == 0
            lines = epipolar_lines(jnp.asarray(read["F"]), points)
            lines = jnp.where(first[:, None, None], through, lines)
            added = np.abs(points) @ np.swapaxes(np.abs(read["F"]), -1, -2)
            sizes = np.where(first[:, None, None], sizes, added)
        else:
            lines = through
        _compare_bias(lines, sizes, grid, side, read)


def _sizes(points: np.ndarray) -> np.ndarray:
    """Sums of absolute values that lines of any direction through points are at most."""
    one = np.ones(points.shape[:-1])
    return np.stack([one, one, np.abs(points[..., :2]).sum(axis=-1)], axis=-1)


def _normals(angles: np.ndarray) -> jax.Array:
    return jnp.float32(np.stack([np.cos(angles), np.sin(angles)], axis=-1))


def _fundamental(read) -> None:
    # Two cameras at one place have no matrix, only noise.
    apart = np.abs(read["F_float64"]).max(axis=(1, 2)) > 1e-12
    assert apart.sum() > 1
    motion, source, target = (read[name][apart] for name in ("T_src_to_tgt", "K_src", "K_tgt"))
    motion, theirs = motion[:, :3], read["F_float64"][apart]
    x, y, z = np.abs(np.moveaxis(motion[..., 3], -1, 0))
    zero = np.zeros_like(x)
    crossed = np.stack([zero, z, y, z, zero, x, y, x, zero], axis=-1).reshape(*x.shape, 3, 3)
    inverses = [np.abs(np.linalg.inv(matrix)) for matrix in (target, source)]
    added = np.swapaxes(inverses[0], -1, -2) @ crossed @ np.abs(motion[..., :3]) @ inverses[1]
    # Where nothing is added up theirs, which turns the translation back and forth, still has noise of float64.
    noise = 8 * np.finfo(np.float64).eps * added.max(axis=(1, 2), keepdims=True)
    _within(
        fundamental_of(jnp.float32(motion), jnp.float32(source), jnp.float32(target)), theirs, CHAIN * added + noise
    )
    # As for files on the host.
    _within(fundamental_of(motion, source, target), theirs, noise)


def _within(ours, theirs, bound) -> None:
    """Every difference is at most what rounding allows it."""
    excess = np.abs(np.asarray(ours, np.float64) - theirs) / (bound + 1e-30)
    assert excess.max() <= 1, f"{excess.max()} times what rounding explains"


def _compare_bias(lines, sizes, grid, side: int, read, magnified: np.ndarray | float = 1.0) -> None:
    """Lines, distances, bands and biases.

    Args:
      lines: of any length.
      sizes: sums of the absolute values that the numbers of the lines are sums of.
      grid, side: of the keys.
      read: theirs.
      magnified: how much larger than rounding the errors of each frame's lines may be.
    """
    chain = np.broadcast_to(CHAIN * np.asarray(magnified), len(read["lines"]))
    _within(lines, read["lines"], chain[:, None, None] * sizes)
    unit = jax.jit(lambda lines: unit_lines(lines, epsilon=EPSILON))(lines)
    made = band(unit, grid, (side, side), integer_centers=True)
    normal = np.linalg.norm(read["lines"][..., :2], axis=-1, keepdims=True) + EPSILON
    near = chain[:, None, None] * ((sizes / normal) @ np.abs(made.points).T)
    if "distance" in read:
        _within(distances(made.lines, made.points), read["distance"], near)
    # The width is a share of the largest distance, the slope 3 / (width + epsilon), the bias their product.
    wide = 3 / (side // 2) * near.max(axis=(1, 2))
    steep = read["decay"].reshape(-1) ** 2 / 3 * wide + CHAIN * read["decay"].reshape(-1)
    _within(made.width, read["band"].reshape(-1), wide)
    _within(made.slope, read["decay"].reshape(-1), steep)
    share = (steep / read["decay"].reshape(-1))[:, None, None]
    allowed = read["decay"].reshape(-1, 1, 1) * (near + wide[:, None, None]) + share * np.abs(read["mask"])
    _within(epipolar_bias(made), read["mask"], allowed)


# Rays ----------------------------------------------------------------------------------------------------------------


def _plucker(case) -> None:
    for made in case.config["runs"]:
        read = {k.removeprefix(f"{made['name']}."): case.io[k] for k in case.io if k.startswith(f"{made['name']}.")}
        expected = read.get("plucker_last_axis_cross", read["plucker"])
        track, chosen, size = from_rows(read["pose_rows"]), read["frame_indices"], tuple(made["size"])
        extrinsics = track.extrinsics[chosen]
        if made["args"]["zero_t_first_frame"]:
            poses = relative(extrinsics, extrinsics[:1])
            np.testing.assert_allclose(
                _whole(inverse(poses)), read["c2w"][0], atol=ROUNDING * np.abs(read["c2w"]).max()
            )
        # The other placement of the first camera is not offered; its rays are compared from the poses given.
        poses = inverse(read["c2w"][0][:, :3])
        intrinsics = resized_and_cropped(track.intrinsics[chosen], tuple(made["hw"]), size)
        height, width = size
        given = read["intrinsics"][0] / [width, height, width, height]
        np.testing.assert_allclose(intrinsics[:, :2], given[:, :2], rtol=ROUNDING)
        cameras = Cameras(jnp.float32(given), jnp.float32(poses))
        rays = np.array(jax.jit(plucker.rays, static_argnums=1)(cameras, size)).transpose(0, 3, 1, 2)
        mirrored = read["flip_flag"].astype(bool)
        rays[mirrored] = rays[mirrored][..., ::-1]
        np.testing.assert_allclose(rays, expected, atol=CHAIN * max(1.0, np.abs(expected).max()))


def _whole(poses: np.ndarray) -> np.ndarray:
    row = np.broadcast_to([[0.0, 0.0, 0.0, 1.0]], (*poses.shape[:-2], 1, 4))
    return np.concatenate([poses, row], axis=-2)


# Homographies --------------------------------------------------------------------------------------------------------


def _homography(case) -> None:
    pooled = latent_valid(case.io["loss_weight.pixel_mask"] > 0, 8, 1)
    np.testing.assert_array_equal(pooled, case.io["loss_weight.latent_mask"][0] > 0)
    io, side, grid = case.io, case.config["F_mat_size"], (case.config["feat"],) * 2
    points = token_points(grid, (side, side), integer_centers=True)
    there = homography.map_points(jnp.asarray(io["H"]), points, (side, side), integer_centers=True, epsilon=EPSILON)
    size = np.abs(io["warped_coords"]).max(axis=(1, 2), keepdims=True)
    # Rounding grows as points near the horizon.
    magnified = 1 / np.minimum(1.0, case.config["smallest_abs_third_component_per_entry"])
    _within(there / size, io["warped_coords"] / size, CHAIN * magnified[:, None, None])
    normals = _normals(np.pi * io["slope_uniform"])
    lines, sizes = pseudo_lines(there, normals), _sizes(np.asarray(there))
    _compare_bias(lines, sizes, grid, side, {name: io[name] for name in ("lines", "band", "decay", "mask")}, magnified)


# Folded clips --------------------------------------------------------------------------------------------------------


def _pairs(case) -> None:
    io = case.io
    for made in case.config["runs"]:
        read = {k.removeprefix(f"{made['name']}."): io[k] for k in io if k.startswith(f"{made['name']}.")}
        n, size = made["n"], (made["size"],) * 2
        track, chosen = from_rows(read["pose_rows"]), read["frame_indices"]
        intrinsics = resized_and_cropped(track.intrinsics[chosen], tuple(made["hw"]), size)
        order, poses = folded(np.arange(2 * n - 1)), folded(track.extrinsics[chosen])
        np.testing.assert_array_equal(order.reshape(-1), read["fold_indices"])
        poses = relative(poses, poses[:1, :1])
        read["c2w"] = read["c2w"].reshape(-1, 4, 4)
        if "split" in made:
            steps = np.linspace(0.0, 1.0, made["split"])
            between = [paths.interpolate(first, last, steps) for first, last in zip(*poses, strict=True)]
            shown, at = np.stack(between, axis=1), folded(intrinsics)[:1].repeat(made["split"], axis=0)
        else:
            shown, at = poses, folded(intrinsics)
        np.testing.assert_allclose(_whole(inverse(shown.reshape(-1, 3, 4))), read["c2w"], atol=ROUNDING)
        _rays_and_matrices(Cameras(at, shown), Cameras(folded(intrinsics), poses), size, read)
    _two_files(case)


def _two_files(case) -> None:
    """Two files as a pair, with the released code's height and width the wrong way round."""
    read = {k.removeprefix("two_files."): case.io[k] for k in case.io if k.startswith("two_files.")}
    side = case.config["two_files"]["size"]
    tracks = [from_rows(read["pose_rows_0"]), from_rows(read["pose_rows_1"][::-1])]
    poses = np.stack([relative(track.extrinsics, track.extrinsics[:1]) for track in tracks])
    at = np.stack([resized_and_cropped(track.intrinsics, (1280, 720), (side, side)) for track in tracks])
    first = at[:1].repeat(2, axis=0)
    at[0, 0] = at[1, 0]  # the frame that both begin with is the second file's
    read["c2w"] = read["c2w"].reshape(-1, 4, 4)
    np.testing.assert_allclose(_whole(inverse(poses.reshape(-1, 3, 4))), read["c2w"], atol=ROUNDING)
    # Matrices use the first file's intrinsics for both.
    _rays_and_matrices(Cameras(at, poses), Cameras(first, poses), (side, side), read)


def _rays_and_matrices(shown: Cameras, pair: Cameras, size, read) -> None:
    from jvgen.geometry.epipolar import fundamental_matrices

    flat = Cameras(*(jnp.float32(part.reshape(-1, *part.shape[2:])) for part in shown))
    rays = np.array(plucker.rays(flat, size)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(rays, read["plucker"], atol=CHAIN * max(1.0, np.abs(read["plucker"]).max()))
    first, second = (Cameras(*(part[i] for part in pair)) for i in range(2))
    ours = np.concatenate([fundamental_matrices(first, second, size), fundamental_matrices(second, first, size)])
    largest = np.abs(read["F_mats"]).max()
    np.testing.assert_allclose(ours / largest, read["F_mats"] / largest, atol=CHAIN)
    matrix = first.intrinsics[0] * [size[1], size[0], size[1], size[0]]
    np.testing.assert_allclose(matrix, read["K_mats"].reshape(-1, 3, 3)[0][[0, 1, 0, 1], [0, 1, 2, 2]], rtol=1e-9)
