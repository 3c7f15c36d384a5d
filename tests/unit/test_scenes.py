"""Rendered scenes agree with their cameras, captions, actions and labels."""

import itertools

import numpy as np
import pytest

from jvgen.config import ConfigError, override, validate_tree
from jvgen.data.scenes.labels import (
    CAMERA_MOTIONS,
    COLORS,
    DIRECTIONS,
    Labels,
    captions_of,
    labels_of,
    nearest_color,
)
from jvgen.data.scenes.renderer import Camera, Renderer, Stage, project
from jvgen.data.scenes.scenes import SceneConfig, render_scene, scene_record
from jvgen.data.scenes.solids import SHAPES, Body
from jvgen.data.store import records
from jvgen.data.video_files import decode_window

STAGE = Stage((0.6, 0.6, 0.6), (0.8, 0.8, 0.9), (0.6, 0.7, 0.9))
SMALL = SceneConfig(height=48, width=48, frames=5)


def camera_of(scene, view: int, frame: int) -> Camera:
    return Camera(scene.intrinsics[view, frame].astype(np.float64), scene.extrinsics[view, frame].astype(np.float64))


def color_pixels(image: np.ndarray, color: str, tolerance: float = 0.09) -> np.ndarray:
    """Where an image has (about) a palette color, in whatever shade: bool (H, W)."""
    chroma = image / np.maximum(image.sum(axis=-1, keepdims=True), 1)
    wanted = np.array(COLORS[color]) / sum(COLORS[color])
    return np.abs(chroma - wanted).max(axis=-1) < tolerance


def test_cameras_are_rigid_and_right_handed() -> None:
    camera = Camera.looking(np.array([2.0, -3.0, 1.5]), np.array([0.1, 0.2, 0.3]), 1.2, 1.5)
    rotation = camera.extrinsics[:, :3]
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(rotation) == pytest.approx(1.0)
    np.testing.assert_allclose(camera.position, [2.0, -3.0, 1.5], atol=1e-12)
    x, y, depth = camera.project(np.array([0.1, 0.2, 0.3]))
    assert (x, y) == (pytest.approx(0.5), pytest.approx(0.5))
    assert depth == pytest.approx(np.linalg.norm([1.9, -3.2, 1.2]))
    above, right = camera.project(np.array([0.1, 0.2, 0.8])), camera.project(np.array([0.1, 0.2, 0.3]) + rotation[0])
    assert above[1] < 0.5 and right[0] > 0.5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("distance", [3.0, 6.0])
def test_a_body_is_drawn_where_its_surface_projects(shape: str, distance: float) -> None:
    """In every direction of the image the drawn body ends where its projected surface ends, to 0.5 % of the image."""
    body = Body(shape, (0.9, 0.1, 0.1), np.array([0.4, -0.3, 0.5]), 0.5, yaw=0.7)
    camera = Camera.looking(np.array([-distance, 0.8, 2.1]), np.array([0.0, 0.0, 0.3]), 1.2, 1.25)
    height, width = 256, 320
    coverage = Renderer(STAGE, camera, height, width).coverage([body], 0)
    surface = camera.project(surface_points(body))
    x, y = surface[:, 0] * width, surface[:, 1] * height
    rows, columns = np.nonzero(coverage > 0)
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    for direction in np.stack([np.cos(angles), np.sin(angles)], axis=1):
        ideal = (np.stack([x, y], axis=1) @ direction).max()
        drawn = (np.stack([columns + 0.5, rows + 0.5], axis=1) @ direction).max()
        assert abs(ideal - drawn) < 1.6
    area = np.ptp(x) * np.ptp(y)
    assert coverage.sum() > 0.4 * area  # and it has no holes to speak of


def surface_points(body: Body) -> np.ndarray:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(20000, 3))
    if body.shape == "ball":
        points /= np.linalg.norm(points, axis=1, keepdims=True)
    elif body.shape == "cube":
        points /= np.abs(points).max(axis=1, keepdims=True)
    else:
        top = 1.0 if body.shape == "cylinder" else 0.0
        z, angle = rng.uniform(-1, 1, 20000), rng.uniform(0, 2 * np.pi, 20000)
        r = 1.0 + (top - 1.0) * (z + 1) / 2
        points = np.stack([r * np.cos(angle), r * np.sin(angle), z], axis=1)
    cos, sin = np.cos(body.yaw), np.sin(body.yaw)
    return body.center + body.radius * points @ np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])


@pytest.mark.parametrize("kind", ["image", "static", "dynamic"])
def test_stored_cameras_project_the_body_onto_its_pixels(kind: str) -> None:
    config = SMALL.replace(kinds={kind: 1.0}, views=2, objects=(1, 2), driven=0.3)
    for index in range(6):
        scene = render_scene(config, 3, index)
        assert scene.kind == kind
        for view, frame in itertools.product(range(scene.video.shape[0]), (0, scene.video.shape[1] - 1)):
            bodies = list(scene.bodies[frame])
            camera = camera_of(scene, view, frame)
            coverage = Renderer(STAGE, camera, 48, 48).coverage(bodies, 0)
            x, y, depth = project(bodies[0].center, camera.intrinsics, camera.extrinsics)
            assert depth > 0
            if coverage.sum() < 12 or not (0 < x < 1 and 0 < y < 1):
                continue  # hidden behind another, or outside a second camera's view
            image = scene.video[view, frame]
            drawn = coverage > 0.99
            assert color_pixels(image, scene.labels.color)[drawn].mean() > 0.9
            if len(bodies) == 1:
                assert drawn[int(y * 48), int(x * 48)]


def test_a_body_in_several_views_is_at_one_place() -> None:
    """Triangulate the body from where it is drawn in two views; it must be where the scene says."""
    config = SceneConfig(height=128, width=128, frames=3, views=3, shapes=("ball",), kinds={"dynamic": 1.0})
    checked = 0
    for index in range(4):
        scene = render_scene(config, 11, index)
        for frame in (0, 2):
            rows = []
            for view in range(3):
                camera = camera_of(scene, view, frame)
                cover = Renderer(STAGE, camera, 128, 128).coverage(list(scene.bodies[frame]), 0)
                if cover[0].any() or cover[-1].any() or cover[:, 0].any() or cover[:, -1].any() or cover.sum() < 20:
                    continue
                seen = color_pixels(scene.video[view, frame], scene.labels.color) & (cover > 0)
                y, x = (np.mean(axis) for axis in np.nonzero(seen))
                fx, fy, cx, cy = camera.intrinsics
                u, v = ((x + 0.5) / 128 - cx) / fx, ((y + 0.5) / 128 - cy) / fy
                projection = camera.extrinsics
                rows += [u * projection[2] - projection[0], v * projection[2] - projection[1]]
            if len(rows) < 4:
                continue
            matrix = np.stack(rows)
            point = np.linalg.lstsq(matrix[:, :3], -matrix[:, 3], rcond=None)[0]
            assert np.linalg.norm(point - scene.bodies[frame][0].center) < 0.06
            checked += 1
    assert checked >= 4


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_body_moves_as_the_caption_says(direction: str) -> None:
    config = SceneConfig(frames=4, directions=(direction,), kinds={"dynamic": 1.0}, objects=(1, 2))
    for index in range(6):
        scene = render_scene(config, 5, index)
        first, last = (scene.video[0, frame] for frame in (0, -1))
        a, b = (np.argwhere(color_pixels(image, scene.labels.color)) for image in (first, last))
        assert len(a) > 15 and len(b) > 15
        (dy, dx), growth = b.mean(axis=0) - a.mean(axis=0), len(b) / len(a)
        assert {
            "left": dx < -15 and abs(dy) < 8,
            "right": dx > 15 and abs(dy) < 8,
            "toward": growth > 1.5 and dy > 4,
            "away": growth < 1 / 1.5 and dy < -4,
            "up": dy < -9 and abs(dx) < 4,
            "down": dy > 9 and abs(dx) < 4,
        }[direction], (direction, dx, dy, growth)
        for caption in scene.captions:
            assert labels_of(caption) == scene.labels
            assert scene.labels.direction == direction


@pytest.mark.parametrize("motion", CAMERA_MOTIONS)
def test_the_camera_moves_as_the_caption_says(motion: str) -> None:
    config = SMALL.replace(camera_motions=(motion,), kinds={"static": 1.0})
    scene = render_scene(config, 2, 0)
    first, last = camera_of(scene, 0, 0), camera_of(scene, 0, -1)
    right, _, forward = (first.extrinsics[axis, :3] for axis in range(3))
    moved = last.position - first.position
    side, ahead = float(moved @ right), float(moved @ forward)
    assert {
        "orbit left": side < -1 and not np.allclose(first.extrinsics[:, :3], last.extrinsics[:, :3]),
        "orbit right": side > 1 and not np.allclose(first.extrinsics[:, :3], last.extrinsics[:, :3]),
        "forward": ahead > 1 and abs(side) < 0.01,
        "backward": ahead < -1 and abs(side) < 0.01,
        "truck left": side < -1 and abs(ahead) < 0.01,
        "truck right": side > 1 and abs(ahead) < 0.01,
    }[motion]
    assert all(
        body.center is scene.bodies[0][0].center or np.array_equal(body.center, scene.bodies[0][0].center)
        for body, *_ in scene.bodies
    )
    assert {labels_of(caption) for caption in scene.captions} == {scene.labels}


def test_actions_move_the_body_and_rewards_count_progress() -> None:
    config = SMALL.replace(frames=12, driven=1.0, kinds={"dynamic": 1.0})
    gains = []
    for index in range(12):
        scene = render_scene(config, 8, index)
        assert scene.labels.driven and scene.actions.shape == (12, 2) and scene.rewards.shape == (12,)
        assert np.abs(scene.actions).max() <= 1.0
        right, forward = scene.extrinsics[0, 0, 0, :3], scene.extrinsics[0, 0, 2, :3] * (1, 1, 0)
        axes = np.stack([right, forward / np.linalg.norm(forward)])
        places = np.stack([bodies[0].center for bodies in scene.bodies])
        steps = np.diff(places @ axes.T, axis=0)
        inside = np.abs(places[1:] @ axes.T).max(axis=1) < 1.44
        np.testing.assert_allclose(steps[inside], 0.28 * scene.actions[:-1][inside], atol=1e-4)
        gains.append(scene.rewards.sum())
        assert scene.rewards.sum() <= 1.0 + 1e-5
    assert np.mean(gains) > 0.6


def test_scenes_are_a_function_of_seed_and_index() -> None:
    config = SMALL.replace(objects=(1, 3), driven=0.5)
    order = [render_scene(config, 1, index) for index in (4, 0, 2)]
    again = [render_scene(config, 1, index) for index in (0, 2, 4)]
    for a, b in ((order[0], again[2]), (order[1], again[0]), (order[2], again[1])):
        np.testing.assert_array_equal(a.video, b.video)
        assert a.captions == b.captions
    assert not np.array_equal(render_scene(config, 2, 4).video, order[0].video)


def test_labels_are_parsed_from_every_caption() -> None:
    for color, shape in itertools.product(COLORS, SHAPES):
        options = [("image", Labels(color, shape)), ("dynamic", Labels(color, shape, driven=True))]
        options += [("dynamic", Labels(color, shape, direction=d)) for d in DIRECTIONS]
        options += [("static", Labels(color, shape, camera=m)) for m in CAMERA_MOTIONS]
        for kind, labels in options:
            captions = captions_of(kind, labels)
            assert len(set(captions)) == 3
            assert all(labels_of(caption) == labels for caption in captions)
            assert not any("a orange" in caption for caption in captions)
    with pytest.raises(ValueError, match="names no color"):
        labels_of("a cat")


@pytest.mark.parametrize("background", ["plain", "textured"])
def test_rendered_colors_match_the_palette(background: str) -> None:
    """The median of a body's pixels is nearest to its own color, and near it in brightness."""
    ratios = []
    for index in range(24):
        scene = render_scene(SMALL.replace(background=background, frames=1, kinds={"image": 1.0}), 0, index)
        drawn = Renderer(STAGE, camera_of(scene, 0, 0), 48, 48).coverage(list(scene.bodies[0]), 0) > 0.99
        middle = np.median(scene.video[0, 0][drawn], axis=0)
        assert nearest_color(middle) == scene.labels.color
        ratios.append(middle.sum() / sum(COLORS[scene.labels.color]))
    assert 0.85 < np.median(ratios) < 1.15


def test_shadows_darken_the_ground_beside_a_body_only() -> None:
    body = Body("ball", (0.9, 0.1, 0.1), np.array([0.0, 0.0, 0.5]), 0.5)
    camera = Camera.looking(np.array([-4.5, 0.0, 2.4]), np.array([0.0, 0.0, 0.3]), 1.2)
    renderer = Renderer(STAGE, camera, 64, 64)
    empty, full = renderer.frame([]).astype(int), renderer.frame([body]).astype(int)
    outside = renderer.coverage([body], 0) == 0
    change = (empty - full).sum(axis=-1) * outside
    assert change.min() >= 0 and change.max() > 90
    assert 0.005 < (change > 30).mean() < 0.1


def test_records_of_scenes() -> None:
    config = SMALL.replace(views=2, kinds={"dynamic": 1.0}, driven=1.0)
    record = scene_record(config, 0, 7)
    record.validate()
    scene = render_scene(config, 0, 7)
    assert record.views == 2 and len(record.clips) == 2 and record.intrinsics.shape == (10, 4)
    for view, clip in enumerate(record.clips):
        decoded = decode_window(clip, range(5))
        assert np.abs(decoded.astype(int) - scene.video[view]).mean() < 3
        np.testing.assert_array_equal(record.cameras(view)[1], scene.extrinsics[view])
    assert records.decode(records.encode(record)).id == record.id
    picture = scene_record(SMALL.replace(kinds={"image": 1.0}), 0, 0)
    np.testing.assert_array_equal(
        decode_window(picture.clips[0], [0]), render_scene(SMALL.replace(kinds={"image": 1.0}), 0, 0).video[0]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("colors=red,beige", "colors.*needs one or more of red"),
        ("objects=2,1", "objects"),
        ("background=noise", "background.*plain, textured"),
        ("frames=0", "frames = 0"),
        ("driven=1.5", "driven"),
    ],
)
def test_invalid_configurations(change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate_tree(override(SceneConfig(), [change]))
