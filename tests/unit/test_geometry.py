"""Camera geometry: definitions, invariances, and numbers computed independently."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jvgen.geometry import epipolar, homography, paths, plucker, rotations
from jvgen.geometry.cameras import (
    Cameras,
    between,
    calibration,
    centers,
    compose,
    inverse,
    inverse_calibration,
    of_latent_frames,
    project,
    relative,
    resized_and_cropped,
    share_a_center,
)
from jvgen.geometry.epipolar import EpipolarBias, band, distances, epipolar_bias, unit_lines

SIZE, GRID = (48, 80), (6, 10)
few = settings(
    max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
seeds = st.integers(0, 2**31 - 1)


def random_cameras(rng: np.random.Generator, count: int, spread: float = 1.0) -> Cameras:
    """Cameras (float64) that look roughly ahead."""
    rotation = rotations.exponential(0.4 * rng.standard_normal((count, 3)))
    extrinsics = np.concatenate([rotation, spread * rng.standard_normal((count, 3, 1))], axis=-1)
    focal = rng.uniform(0.5, 1.5, (count, 2))
    return Cameras(np.concatenate([focal, rng.uniform(0.4, 0.6, (count, 2))], axis=-1), extrinsics)


def on_device(cameras: Cameras) -> Cameras:
    return Cameras(*(jnp.float32(part) for part in cameras))


@functools.partial(jax.jit, static_argnames="form")
def bias_of(source: Cameras, target: Cameras, form: EpipolarBias = EpipolarBias.SOFT, scale: jax.Array = 1.0):
    matrices = scale * epipolar.fundamental_matrices(source, target, SIZE)
    lines = unit_lines(epipolar.epipolar_lines(matrices, epipolar.token_points(GRID, SIZE)))
    return epipolar_bias(band(lines, GRID, SIZE, form=form))


# Poses ---------------------------------------------------------------------------------------------------------------


@few
@given(seeds)
def test_motions_compose_and_invert(seed):
    first, second = random_cameras(np.random.default_rng(seed), 2).extrinsics
    np.testing.assert_allclose(compose(inverse(first), first), np.eye(3, 4), atol=1e-12)
    np.testing.assert_allclose(compose(between(first, second), first), second, atol=1e-12)
    moved = relative(np.stack([first, second]), first)
    np.testing.assert_allclose(moved[0], np.eye(3, 4), atol=1e-12)
    np.testing.assert_allclose(between(moved[0], moved[1]), between(first, second), atol=1e-12)
    assert share_a_center(first, first) and not share_a_center(first, second)


def test_a_camera_that_cannot_be_turned_to_its_target_is_an_error():
    for position, target in (((0.0, 0.0, 0.0), (2.0, 0.0, 0.0)), ((1.0, 2.0, 3.0), (1.0, 2.0, 3.0))):
        with pytest.raises(ValueError, match="must differ in y or z"):
            paths.look_at(np.array(position), np.array(target))
    seen = project(np.array([[0.0, 0.0, 0.0]]), Cameras(np.ones(4) / 2, paths.look_at(np.ones(3), np.zeros(3))), SIZE)
    np.testing.assert_allclose(seen, [[SIZE[1] / 2, SIZE[0] / 2, 3**0.5]])


def test_numpy_stays_numpy_and_jax_stays_jax():
    cameras = random_cameras(np.random.default_rng(0), 3)
    assert inverse(cameras.extrinsics).dtype == np.float64
    made = jax.jit(inverse)(jnp.float32(cameras.extrinsics))
    assert isinstance(made, jax.Array) and made.dtype == jnp.float32
    np.testing.assert_allclose(made, inverse(cameras.extrinsics), atol=1e-5)


def test_calibration_of_images_that_are_not_square():
    matrix = calibration(np.array([0.5, 0.75, 0.5, 0.4]), (40, 100))
    np.testing.assert_allclose(matrix, [[50, 0, 50], [0, 30, 16], [0, 0, 1]])
    np.testing.assert_allclose(inverse_calibration(matrix) @ matrix, np.eye(3), atol=1e-15)


def test_crops_move_points_as_they_move_pixels():
    """A point of the scene, projected before and after: scaled by the resize, shifted by the crop."""
    cameras, point = random_cameras(np.random.default_rng(3), 1), np.array([[[0.1, -0.2, 5.0]]])
    source, size = (72, 128), (32, 32)
    seen = project(point, cameras, source)[0, 0, :2]
    cropped = cameras._replace(intrinsics=resized_and_cropped(cameras.intrinsics, source, size))
    scale = 32 / 72
    np.testing.assert_allclose(project(point, cropped, size)[0, 0, :2], seen * scale - [(128 * scale - 32) / 2, 0])
    np.testing.assert_allclose(resized_and_cropped(cameras.intrinsics, (36, 64), (72, 128)), cameras.intrinsics)


def test_one_camera_per_latent_frame():
    np.testing.assert_array_equal(of_latent_frames(np.arange(13), 4, axis=0), [0, 4, 8, 12])
    np.testing.assert_array_equal(of_latent_frames(np.arange(3), 1, axis=0), [0, 1, 2])
    with pytest.raises(ValueError, match="12 frames: with 4 frames per latent frame there must be 4n \\+ 1"):
        of_latent_frames(np.zeros(12), 4, axis=0)


@few
@given(seeds)
def test_rotations(seed):
    rng = np.random.default_rng(seed)
    vector = rng.standard_normal(3)
    vector *= rng.choice([0.0, 1e-9, 0.3, 3.0, np.pi]) / np.linalg.norm(vector)
    turn = rotations.exponential(vector)
    assert rotations.rotation_error(turn) < 1e-12
    np.testing.assert_allclose(rotations.exponential(rotations.logarithm(turn)), turn, atol=1e-6)
    assert rotations.rotation_error(-turn) >= 2.0
    np.testing.assert_allclose(rotations.nearest(turn + 1e-3 * rng.standard_normal((3, 3))), turn, atol=5e-3)
    start = rotations.exponential(rng.standard_normal(3))
    half = rotations.interpolate(start, start @ turn, np.array([0.0, 0.5, 1.0]))
    np.testing.assert_allclose(half[0], start, atol=1e-12)
    np.testing.assert_allclose(half[2], start @ turn, atol=1e-6)
    assert rotations.angle_between(start, half[1]) == pytest.approx(np.linalg.norm(vector) / 2, abs=1e-6)


# Epipolar geometry ---------------------------------------------------------------------------------------------------


@few
@given(seeds)
def test_images_of_a_point_lie_on_their_epipolar_lines(seed):
    rng = np.random.default_rng(seed)
    source, target = (Cameras(*(part[i] for part in random_cameras(rng, 2))) for i in range(2))
    points = np.array([0.0, 0.0, 6.0]) + rng.standard_normal((20, 3))
    x, y = (project(points, camera, SIZE) for camera in (source, target))
    visible = (x[:, 2] > 0.5) & (y[:, 2] > 0.5)
    x, y = (np.concatenate([image[visible, :2], np.ones((visible.sum(), 1))], axis=1) for image in (x, y))
    matrix = epipolar.fundamental_matrices(source, target, SIZE)
    lines = x @ matrix.T
    off = np.abs(np.sum(y * lines, axis=1)) / np.linalg.norm(lines[:, :2], axis=1)
    assert (off < 1e-8 * (1 + np.abs(y).max())).all()
    np.testing.assert_allclose(epipolar.fundamental_matrices(target, source, SIZE), matrix.T, atol=1e-12)


@few
@given(seeds, st.sampled_from([1e-4, 0.5, 3.0, -7.0, 1e5]), st.sampled_from(list(EpipolarBias)))
def test_the_bias_does_not_depend_on_the_scale_of_a_matrix(seed, scale, form):
    source, target = (on_device(random_cameras(np.random.default_rng(seed + i), 3)) for i in range(2))
    plain = bias_of(source, target, form)
    # What float32 leaves of a distance may cross a hard edge: compared where the bias is one or the other for sure.
    scaled = bias_of(source, target, form, jnp.float32(scale))
    close = np.isclose(plain, scaled, rtol=1e-3, atol=1e-2)
    assert close.mean() > 0.999 and np.isfinite(plain).all() and (plain <= 0).all()


@few
@given(seeds, st.sampled_from(["same", "rotated", "zoomed", "behind", "turned around", "far away", "at the epipole"]))
def test_degenerate_cameras_give_finite_numbers(seed, case):
    rng = np.random.default_rng(seed)
    source = random_cameras(rng, 1)
    intrinsics, extrinsics = source.intrinsics.copy(), source.extrinsics.copy()
    turn = np.concatenate([rotations.exponential(0.3 * rng.standard_normal(3)), np.zeros((3, 1))], axis=1)
    half = np.concatenate([np.diag([-1.0, 1.0, -1.0]), np.zeros((3, 1))], axis=1)
    ahead = np.concatenate([np.eye(3), [[0.0], [0.0], [-0.7]]], axis=1)
    if case == "rotated":
        extrinsics = compose(turn[None], extrinsics)
    elif case == "zoomed":
        intrinsics[:, :2] *= 1.3
    elif case == "behind":
        extrinsics[:, 2, 3] += 3.0
    elif case == "turned around":
        extrinsics = compose(half[None], extrinsics)
    elif case == "far away":
        extrinsics[:, :, 3] += 1e6
    elif case == "at the epipole":
        # Straight ahead, with the epipole on a sample.
        center = epipolar.token_points(GRID, SIZE)[25, :2] / [SIZE[1], SIZE[0]]
        intrinsics[:, 2:] = center
        source = source._replace(intrinsics=intrinsics)
        extrinsics = compose(ahead[None], extrinsics)
    target = Cameras(intrinsics, extrinsics)
    for form in EpipolarBias:
        made = np.asarray(bias_of(on_device(source), on_device(target), form))
        assert np.isfinite(made).all() and (made <= 0).all(), (case, form)
        if case in ("same", "rotated", "zoomed", "turned around"):
            np.testing.assert_array_equal(made, 0.0)


def test_a_pure_rotation_is_a_homography():
    rng = np.random.default_rng(1)
    source = random_cameras(rng, 1)
    turn = np.concatenate([rotations.exponential(0.2 * rng.standard_normal(3)), np.zeros((3, 1))], axis=1)
    target = Cameras(source.intrinsics * 1.1, compose(turn[None], source.extrinsics))
    points = np.array([[0.3, -0.1, 4.0], [1.0, 0.5, 9.0]])
    x, y = (project(points[None], camera, SIZE)[0] for camera in (source, target))
    matrix = epipolar.infinite_homographies(source, target, SIZE)[0]
    there = np.concatenate([x[:, :2], np.ones((2, 1))], axis=1) @ matrix.T
    np.testing.assert_allclose(there[:, :2] / there[:, 2:], y[:, :2], atol=1e-9)


@pytest.mark.parametrize("form", list(EpipolarBias))
def test_the_band_follows_the_lines(form):
    """Cameras side by side: lines are rows, and only keys of the same row are free."""
    left = Cameras(np.array([[1.0, SIZE[1] / SIZE[0], 0.5, 0.5]]), np.eye(3, 4)[None])
    right = left._replace(extrinsics=np.concatenate([np.eye(3), [[-1.0], [0.0], [0.0]]], axis=1)[None])
    made = np.asarray(bias_of(on_device(left), on_device(right), form))[0].reshape(*GRID, *GRID)
    for row in range(GRID[0]):
        assert (made[row, :, row] == 0).all()
        assert (made[row][:, np.arange(GRID[0]) != row] < (-1e20 if form is EpipolarBias.HARD else -0.05)).all()


def test_the_soft_bias_is_the_released_one():
    """Its least value is -3 (S // 2 / 3 - 1) for squares of S pixels, whatever the cameras."""
    source, target = (on_device(random_cameras(np.random.default_rng(i), 4)) for i in range(2))

    @functools.partial(jax.jit, static_argnames="side")
    def least(source: Cameras, target: Cameras, side: int):
        size, grid = (side, side), (8, 8)
        matrices = epipolar.fundamental_matrices(source, target, size)
        lines = unit_lines(epipolar.epipolar_lines(matrices, epipolar.token_points(grid, size)))
        return epipolar_bias(band(lines, grid, size)).min(axis=(1, 2))

    for side in (256, 64):
        np.testing.assert_allclose(least(source, target, side), -3.0 * (side // 2 / 3.0 - 1.0), rtol=1e-5)


def test_a_hard_band_never_masks_all_keys():
    source, target = (on_device(random_cameras(np.random.default_rng(i), 20)) for i in (5, 6))
    free = np.asarray(bias_of(source, target, EpipolarBias.HARD)) == 0
    assert free.any(axis=-1).all() and free.mean() < 0.7
    # Those whose line misses the image may look everywhere, the others only near it.
    assert set(np.unique(free.all(axis=-1))) == {False, True}


def test_lines_through_mapped_points():
    points, shift = epipolar.token_points((8, 8), (64, 64)), np.eye(3, dtype=np.float32)
    shift[0, 2] = 8.0
    normals = epipolar.random_normals(jax.random.key(0), (1,))
    np.testing.assert_allclose(jnp.linalg.norm(normals, axis=-1), 1.0, atol=1e-6)

    @jax.jit
    def distances_after(matrix: jax.Array):
        there = homography.map_points(matrix[None], points, (64, 64))
        return distances(unit_lines(epipolar.pseudo_lines(there, normals)), points)[0]

    for matrix, offset in ((np.eye(3, dtype=np.float32), 0), (shift, 1)):
        off = np.asarray(distances_after(matrix))
        moved = off.reshape(8, 8, 8, 8)
        for column in range(8 - offset):
            assert (np.abs(moved[range(8), column, range(8), column + offset]) < 1e-3).all()


def test_points_behind_the_horizon_have_no_bias():
    matrix = np.eye(3, dtype=np.float32)
    matrix[2, 0] = 0.05  # the horizon is 20 pixels left of the center
    points = epipolar.token_points((8, 8), (64, 64))

    @jax.jit
    def places_and_bias(matrix: jax.Array):
        there = homography.map_points(matrix[None], points, (64, 64))
        lines = unit_lines(epipolar.pseudo_lines(there, jnp.float32([[0.0, 1.0]])))
        return there[0, :, 2] == 0, epipolar_bias(band(lines, (8, 8), (64, 64)))

    nowhere, made = (np.asarray(part) for part in places_and_bias(matrix))
    assert 0 < nowhere.sum() < len(points)
    assert (np.asarray(made)[0][nowhere] == 0).all() and (np.asarray(made)[0][~nowhere] < 0).any()


# Rays, homographies, paths -------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(1, 2))
def rays_of(cameras: Cameras, size: tuple[int, int], grid: tuple[int, int]) -> jax.Array:
    return plucker.rays(cameras, size, grid)


@few
@given(seeds)
def test_rays_go_through_the_camera_and_its_pixels(seed):
    cameras = random_cameras(np.random.default_rng(seed), 2)
    made = np.asarray(rays_of(on_device(cameras), SIZE, GRID))
    assert made.shape == (2, *GRID, 6)
    moment, direction = made[..., :3], made[..., 3:]
    np.testing.assert_allclose(np.linalg.norm(direction, axis=-1), 1.0, atol=1e-6)
    np.testing.assert_allclose(np.sum(moment * direction, axis=-1), 0.0, atol=1e-5)
    origin = centers(cameras.extrinsics)[:, None, None]
    np.testing.assert_allclose(np.cross(np.broadcast_to(origin, direction.shape), direction), moment, atol=1e-5)
    # Two units along each ray, back through the camera: the centers of the cells.
    seen = project((origin + 2 * direction).reshape(2, -1, 3), cameras, SIZE)
    np.testing.assert_allclose(
        seen[..., :2], np.broadcast_to(epipolar.token_points(GRID, SIZE)[:, :2], (2, 60, 2)), atol=1e-3
    )


def test_three_frames():
    """`torch.cross` without an axis takes the first one of size three; rays of three cameras showed it."""
    cameras = on_device(random_cameras(np.random.default_rng(0), 3))
    single = [rays_of(Cameras(*(part[i : i + 1] for part in cameras)), GRID, GRID)[0] for i in range(3)]
    np.testing.assert_allclose(rays_of(cameras, GRID, GRID), np.stack(single), atol=1e-6)


def test_homographies_are_composed_in_the_published_order():
    last = homography.Motion(
        translation=np.array([4.0, -3.0]),
        rotation=np.array(0.05),
        scale=np.array([0.1, -0.05]),
        shear=np.array([0.02, 0.01]),
        projection=np.array([1e-4, -2e-4]),
    )
    matrices = homography.homographies(homography.ramp(last, 3))
    np.testing.assert_array_equal(matrices[0], np.eye(3))
    half = [[1.04965, -0.014076, 2], [0.031046, 0.975108, -1.5], [5e-5, -1e-4, 1]]
    full = [[1.09855, -0.026308, 4], [0.064165, 0.950512, -3], [1e-4, -2e-4, 1]]
    np.testing.assert_allclose(matrices[1:], [half, full], atol=6e-6)


def test_a_homography_in_pixels_of_opencv():
    rng, size = np.random.default_rng(0), (40, 60)
    matrix = np.eye(3) + 0.01 * rng.standard_normal((3, 3)) * [[1, 1, 100], [1, 1, 100], [0.1, 0.1, 0]]
    index = np.array([7.0, 11.0, 1.0])
    taken = homography.on_pixel_indices(matrix, size) @ index
    expected = homography.map_points(matrix[None], (index + [0.5, 0.5, 0])[None], size)[0, 0]
    np.testing.assert_allclose(taken[:2] / taken[2] + 0.5, expected[:2], atol=1e-9)


@pytest.mark.parametrize("name", paths.PATHS)
@pytest.mark.parametrize("views", [1, 3, 4])
def test_named_paths(name, views):
    made = paths.named_paths(name, views, 5, distance=0.5)
    assert made.shape == (views, 5, 3, 4)
    np.testing.assert_array_equal(made[:, 0], np.broadcast_to(np.eye(3, 4), (views, 3, 4)))
    assert rotations.rotation_error(made[..., :3]).max() < 1e-9
    ends = centers(made[:, -1])
    if views > 1:
        apart = np.linalg.norm(ends[:, None] - ends[None], axis=-1) + np.eye(views)
        assert apart.min() > 1e-3
    if name in ("circle", "hemisphere"):
        np.testing.assert_allclose(np.linalg.norm(ends, axis=-1), 0.5, atol=1e-9)
        # The point in front of the start stays in the middle of the last frame.
        seen = made[:, -1, :, :3] @ [0, 0, 1] + made[:, -1, :, 3]
        np.testing.assert_allclose(seen[:, :2] / seen[:, 2:], 0.0, atol=1e-9)


def test_unknown_paths_are_rejected():
    with pytest.raises(ValueError, match="cameras = 'spiral': must be one of circle, hemisphere"):
        paths.named_paths("spiral", 2, 5)
