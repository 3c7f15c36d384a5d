"""The built-in data set: procedural 3-D scenes with exact cameras, captions and actions, rendered in numpy."""

import dataclasses
import math
from typing import Annotated

import numpy as np

from jvgen.config import Config
from jvgen.data.scenes.labels import CAMERA_MOTIONS, COLORS, DIRECTIONS, Labels, captions_of
from jvgen.data.scenes.renderer import Camera, Renderer, Stage
from jvgen.data.scenes.solids import SHAPES, Body
from jvgen.data.store.records import Record
from jvgen.data.video_files import encode_image, encode_video
from jvgen.value_rules import Bounds, Fraction, FrameRate, Frames, Pixels, Quality, Weight

_MIDDLE_SHADE = 0.86  # median shading factor of a body's visible surface
SPEED = 0.28  # distance that an action of size 1 moves a body per frame, in world units
REACH = 1.45  # a driven body stays within this distance of the origin along each axis


Bodies = Annotated[int, Bounds(at_least=1, at_most=4)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SceneConfig(Config):
    """Appearance and content of the scenes.

    Attributes:
      height, width: frame size in pixels.
      frames: frames per clip.
      frames_per_second: frame rate of the clips.
      kinds: weights of images, static scenes with a moving camera, and dynamic scenes with a fixed camera.
      driven: fraction of the dynamic scenes in which 2-D actions push the body to a goal.
      views: synchronized cameras of a dynamic scene.
      objects: minimum and maximum number of bodies in a scene; the first of them is the one that moves.
      colors, shapes, directions, camera_motions: values to draw from.
      background: "plain" (fixed ground, sky and light) or "textured" (checkerboards, varied tones and light).
      wander: how much camera positions vary between scenes, 0 to 1.
      supersampling: rays per pixel along each axis.
      quality: constant rate factor (CRF) of the encoded clips.
    """

    height: Pixels = 64
    width: Pixels = 64
    frames: Frames = 16
    frames_per_second: FrameRate = 8.0
    kinds: dict[str, Weight] = dataclasses.field(default_factory=lambda: {"image": 0.2, "static": 0.3, "dynamic": 0.5})
    driven: Fraction = 0.0
    views: Annotated[int, Bounds(at_least=1, at_most=64)] = 1
    objects: tuple[Bodies, Bodies] = (1, 1)
    colors: tuple[str, ...] = tuple(COLORS)
    shapes: tuple[str, ...] = SHAPES
    directions: tuple[str, ...] = ("left", "right", "toward", "away")
    camera_motions: tuple[str, ...] = CAMERA_MOTIONS
    background: str = "textured"
    wander: Fraction = 1.0
    supersampling: Annotated[int, Bounds(at_least=1, at_most=16)] = 2
    quality: Quality = 12

    def validate(self) -> None:
        for name, known in (
            ("colors", COLORS),
            ("shapes", SHAPES),
            ("directions", DIRECTIONS),
            ("camera_motions", CAMERA_MOTIONS),
        ):
            unknown = [item for item in getattr(self, name) if item not in known]
            if unknown or not getattr(self, name):
                raise ValueError(f"{name} = {getattr(self, name)}: needs one or more of {', '.join(known)}.")
        if set(self.kinds) - {"image", "static", "dynamic"} or not any(self.kinds.values()):
            raise ValueError(f"kinds = {self.kinds}: weights of image, static and dynamic, of which one is positive.")
        low, high = self.objects
        if low > high:
            raise ValueError(f"objects = {self.objects}: the minimum and the maximum; exchange them.")
        if self.background not in ("plain", "textured"):
            raise ValueError(f"background = {self.background!r}: one of plain, textured.")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """A rendered scene with its ground truth. V views, F frames, O bodies.

    Attributes:
      kind: "image", "static" or "dynamic".
      labels: its labels.
      captions: alternative captions of the labels.
      video: uint8 (V, F, H, W, 3).
      intrinsics: float32 (V, F, 4); extrinsics: float32 (V, F, 3, 4), world-to-camera.
      actions: float32 (F, 2) or (0, 0): action t moves the body from frame t to t+1, along the first camera's right and
        forward directions on the ground; from -1 to 1.
      rewards: float32 (F,) or (0,): decrease of the distance to the goal by action t, relative to the initial distance
        (up to 1 in sum).
      bodies: the bodies of each frame.
    """

    kind: str
    labels: Labels
    captions: tuple[str, ...]
    video: np.ndarray
    intrinsics: np.ndarray
    extrinsics: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    bodies: tuple[tuple[Body, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Setting:
    """A scene before it is rendered: what `render_scene` draws at random.

    Attributes:
      kind, labels: as in `Scene`.
      stage: ground, sky and light.
      cameras: one track of F cameras per view.
      axes: (2, 3): the first camera's right and forward directions on the ground, in which actions and goals count.
      body: the moving body at the first frame.
      path: (F, 3): where its center is at each frame.
      static: all other bodies.
      actions, rewards: as in `Scene`.
      goal: (2,) where a driven body is to go, along `axes`; None for other scenes.
    """

    kind: str
    labels: Labels
    stage: Stage
    cameras: list[list[Camera]]
    axes: np.ndarray
    body: Body
    path: np.ndarray
    static: list[Body]
    actions: np.ndarray
    rewards: np.ndarray
    goal: np.ndarray | None


def draw_setting(config: SceneConfig, seed: int, index: int) -> Setting:
    """The setting of scene number `index` of the data set `seed`: a pure function of its arguments."""
    rng = np.random.default_rng((seed, index))
    kinds = sorted(config.kinds)
    shares = np.array([config.kinds[kind] for kind in kinds])
    kind = str(rng.choice(kinds, p=shares / shares.sum()))
    driven = kind == "dynamic" and rng.random() < config.driven
    color, shape = str(rng.choice(config.colors)), str(rng.choice(config.shapes))
    direction = str(rng.choice(config.directions)) if kind == "dynamic" and not driven else None
    motion = str(rng.choice(config.camera_motions)) if kind == "static" else None

    frames = 1 if kind == "image" else config.frames
    views = config.views if kind == "dynamic" else 1
    cameras = _cameras(config, rng, frames, views, motion)
    axes = _ground_axes(cameras[0][0])
    radius = float(rng.uniform(0.46, 0.56)) if kind == "dynamic" else float(rng.uniform(0.55, 0.75))
    actions, rewards, goal = np.zeros((0, 0), np.float32), np.zeros(0, np.float32), None
    if driven:
        path, actions, rewards, goal = _driven_path(rng, frames, axes)
    else:
        path = _path(rng, frames, axes, direction, cameras[0][0])
    path = path + np.array([0.0, 0.0, radius])
    static = _static_bodies(config, rng, axes, path, radius, color)
    yaw = float(rng.uniform(0.0, math.pi / 2))
    return Setting(
        kind=kind,
        labels=Labels(color, shape, direction, motion, driven),
        stage=_stage(config, rng, None if goal is None else goal_marker(goal, axes)),
        cameras=cameras,
        axes=axes,
        body=Body(shape, _albedo(color), path[0], radius, yaw),
        path=path,
        static=static,
        actions=actions,
        rewards=rewards,
        goal=goal,
    )


def render_scene(config: SceneConfig, seed: int, index: int) -> Scene:
    """Scene number `index` of the data set `seed`: a pure function of its arguments."""
    setting = draw_setting(config, seed, index)
    bodies = tuple((dataclasses.replace(setting.body, center=center), *setting.static) for center in setting.path)
    return Scene(
        kind=setting.kind,
        labels=setting.labels,
        captions=captions_of(setting.kind, setting.labels),
        video=np.stack([_render(config, setting.stage, track, bodies) for track in setting.cameras]),
        intrinsics=np.array([[c.intrinsics for c in track] for track in setting.cameras], np.float32),
        extrinsics=np.array([[c.extrinsics for c in track] for track in setting.cameras], np.float32),
        actions=setting.actions,
        rewards=setting.rewards,
        bodies=bodies,
    )


def scene_id(seed: int, index: int) -> str:
    """Id of the record of scene number `index`."""
    return f"scene-{seed}-{index:08d}"


def scene_record(config: SceneConfig, seed: int, index: int) -> Record:
    """Scene number `index` as a record: png for images, H.264 in mp4 for clips."""
    scene = render_scene(config, seed, index)
    views, frames = scene.video.shape[:2]
    if scene.kind == "image":
        clips = (encode_image(scene.video[0, 0]),)
    else:
        clips = tuple(
            encode_video(view, config.frames_per_second, quality=config.quality, full_color=True)
            for view in scene.video
        )
    return Record(
        id=scene_id(seed, index),
        kind=scene.kind,
        clips=clips,
        captions=scene.captions,
        frames_per_second=0.0 if scene.kind == "image" else config.frames_per_second,
        frames=frames,
        height=config.height,
        width=config.width,
        views=views,
        intrinsics=scene.intrinsics.reshape(-1, 4),
        extrinsics=scene.extrinsics.reshape(-1, 3, 4),
        actions=scene.actions,
        rewards=scene.rewards,
    )


def _albedo(color: str) -> tuple[float, float, float]:
    return tuple(channel / 255.0 / _MIDDLE_SHADE for channel in COLORS[color])


def _render(config: SceneConfig, stage: Stage, track: list[Camera], bodies: tuple[tuple[Body, ...], ...]) -> np.ndarray:
    """One view, uint8 (F, H, W, 3). The rays of a static camera are cast once."""
    images, renderer = [], None
    for camera, present in zip(track, bodies, strict=True):
        if renderer is None or renderer.camera is not camera:
            renderer = Renderer(stage, camera, config.height, config.width, samples=config.supersampling)
        images.append(renderer.frame(list(present)))
    return np.stack(images)


def _cameras(
    config: SceneConfig, rng: np.random.Generator, frames: int, views: int, motion: str | None
) -> list[list[Camera]]:
    """F cameras for each view; all of them face the center of the scene."""
    wander, aspect = config.wander, config.width / config.height
    azimuth = float(rng.uniform(-math.pi, math.pi)) * wander
    distance = 4.6 + 0.5 * wander * float(rng.uniform(-1, 1))
    elevation = math.radians(27.0 + 5.0 * wander * float(rng.uniform(-1, 1)))
    focal = 1.15 + 0.1 * wander * float(rng.uniform(-1, 1))
    target = np.array([0.0, 0.0, 0.3])

    def camera(azimuth: float, distance: float, shift: float = 0.0) -> Camera:
        away = np.array([math.cos(azimuth), math.sin(azimuth)]) * math.cos(elevation)
        side = np.array([-math.sin(azimuth), math.cos(azimuth), 0.0]) * shift
        position = target + distance * np.array([*away, math.sin(elevation)]) + side
        return Camera.looking(position, target + side, focal, aspect)

    if motion is None:
        gaps = [0.0, *np.cumsum([math.radians(float(rng.uniform(45, 75))) for _ in range(views - 1)])]
        return [[camera(azimuth + gap, distance)] * frames for gap in gaps]
    extent = float(rng.uniform(0.8, 1.2))
    tracks = {
        # Seen from above, a camera that moves to its own left orbits the target clockwise.
        "orbit left": lambda s: camera(azimuth - 0.9 * extent * s, distance),
        "orbit right": lambda s: camera(azimuth + 0.9 * extent * s, distance),
        "forward": lambda s: camera(azimuth, distance * (1.18 - 0.42 * extent * (s + 0.5))),
        "backward": lambda s: camera(azimuth, distance * (1.18 + 0.42 * extent * (s - 0.5))),
        "truck left": lambda s: camera(azimuth, distance, -1.5 * extent * s),
        "truck right": lambda s: camera(azimuth, distance, 1.5 * extent * s),
    }
    return [[tracks[motion](s) for s in np.linspace(-0.5, 0.5, frames)]]


def _ground_axes(camera: Camera) -> np.ndarray:
    """(2, 3): the camera's right and forward directions along the ground."""
    right, forward = camera.extrinsics[0, :3], camera.extrinsics[2, :3] * (1.0, 1.0, 0.0)
    return np.stack([right, forward / np.linalg.norm(forward)])


def _path(rng: np.random.Generator, frames: int, axes: np.ndarray, direction: str | None, camera: Camera) -> np.ndarray:
    """(F, 3): the base of a body that moves along a straight line at constant speed."""
    right, forward = axes
    if direction is None:
        place = rng.uniform(-0.35, 0.35, 2) @ axes
        return np.repeat(place[None], frames, axis=0)
    line = {
        "left": -right,
        "right": right,
        "toward": -forward,
        "away": forward,
        "up": np.array([0.0, 0.0, 1.0]),
        "down": np.array([0.0, 0.0, -1.0]),
    }[direction]
    aside = float(rng.uniform(-1, 1))
    travel = float(rng.uniform(1.9, 2.3)) * (0.5 if direction in ("up", "down") else 1.0)
    steps = np.linspace(-0.5, 0.5, frames) if frames > 1 else np.zeros(1)
    if direction in ("left", "right"):
        start = forward * 0.45 * aside
    elif direction in ("up", "down"):
        start = right * 0.7 * aside + np.array([0.0, 0.0, travel / 2])
    else:
        start = right * 0.5 * aside
        travel *= 1.25  # compensates foreshortening
    return start + travel * steps[:, None] * line


def _driven_path(
    rng: np.random.Generator, frames: int, axes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A body pushed to a goal by a noisy policy: path (F, 3), actions, rewards, goal (2,)."""
    start = rng.uniform(-1.2, 1.2, 2)
    goal = rng.uniform(-1.2, 1.2, 2)
    while np.linalg.norm(goal - start) < 1.2:
        goal = rng.uniform(-1.2, 1.2, 2)
    first = float(np.linalg.norm(goal - start))
    skill, drift = float(rng.uniform(0.5, 1.0)), np.zeros(2)
    places, actions, rewards = [start], [], []
    for _ in range(frames):
        drift = 0.7 * drift + 0.35 * rng.normal(size=2)
        wish = (goal - places[-1]) / SPEED
        wish /= max(1.0, float(np.linalg.norm(wish)))
        action = np.clip(skill * wish + (1.2 - skill) * drift, -1.0, 1.0).astype(np.float32)
        places.append(pushed(places[-1], action))
        actions.append(action)
        rewards.append((np.linalg.norm(goal - places[-2]) - np.linalg.norm(goal - places[-1])) / first)
    return np.stack(places[:frames]) @ axes, np.stack(actions), np.asarray(rewards, np.float32), goal


def pushed(place: np.ndarray, action: np.ndarray) -> np.ndarray:
    """Where an action moves a driven body from `place`; both (2,), along the scene's axes."""
    return np.clip(place + SPEED * np.asarray(action, np.float64), -REACH, REACH)


def goal_marker(goal: np.ndarray, axes: np.ndarray) -> tuple[float, float, float]:
    """The ring on the ground that marks a goal: x, y, radius."""
    spot = goal @ axes
    return float(spot[0]), float(spot[1]), 0.5


def _static_bodies(
    config: SceneConfig, rng: np.random.Generator, axes: np.ndarray, path: np.ndarray, radius: float, color: str
) -> list[Body]:
    """Static bodies of other colors, that do not touch the moving body or each other."""
    number = int(rng.integers(config.objects[0], config.objects[1] + 1)) - 1
    colors = [name for name in config.colors if name != color] or [color]
    bodies: list[Body] = []
    for _ in range(40 * number):
        if len(bodies) == number:
            break
        size = float(rng.uniform(0.3, 0.45))
        center = np.array([*(rng.uniform(-1.7, 1.7, 2) @ axes)[:2], size])
        clear = np.hypot(*(path - center)[:, :2].T).min() > 1.5 * (radius + size)
        clear &= all(np.hypot(*(body.center - center)[:2]) > 1.5 * (body.radius + size) for body in bodies)
        if clear:
            other = str(rng.choice(colors))
            bodies.append(
                Body(str(rng.choice(config.shapes)), _albedo(other), center, size, float(rng.uniform(0, 1.5)))
            )
    return bodies


def _stage(config: SceneConfig, rng: np.random.Generator, marker: tuple[float, float, float] | None) -> Stage:
    if config.background == "plain":
        return Stage((0.68, 0.67, 0.65), (0.84, 0.87, 0.90), (0.62, 0.73, 0.86), marker=marker)
    warmth, tone = float(rng.uniform(-1, 1)), float(rng.uniform(0.5, 0.7))
    dusk = float(rng.uniform(0, 1))
    low = (0.88 + 0.06 * dusk, 0.88 - 0.04 * dusk, 0.90 - 0.12 * dusk)
    high = (0.45 + 0.10 * dusk, 0.62 - 0.06 * dusk, 0.84 - 0.06 * dusk)
    angle = float(rng.uniform(-math.pi, math.pi))
    tilt = float(rng.uniform(0.5, 0.66))
    return Stage(
        ground=(tone + 0.04 * warmth, tone, tone - 0.05 * warmth),
        sky_low=low,
        sky_high=high,
        checker=float(rng.uniform(0.06, 0.16)),
        checker_size=float(rng.uniform(0.6, 1.2)),
        light=(tilt * math.cos(angle), tilt * math.sin(angle), math.sqrt(1 - tilt * tilt)),
        marker=marker,
    )
