"""A small ray caster in numpy: shaded solids on a ground plane, seen by exact pinhole cameras.

World axes: x and y span the ground, z points up. Camera axes are OpenCV's: x right, y down, z forward. A point projects
to (fx X/Z + cx, fy Y/Z + cy), where 0 is the left (top) edge of the image and 1 its right (bottom) edge, so that pixel
i covers [i, i+1) / width.
"""

import dataclasses
import functools

import numpy as np

from jvgen.data.scenes.solids import FAR, NEAR, Body, Planes, intersect

_LAMP_DISTANCE = 12.0


@dataclasses.dataclass(frozen=True)
class Camera:
    """A pinhole camera.

    Attributes:
      intrinsics: (4,) fx, fy, cx, cy; x by image width, y by image height.
      extrinsics: (3, 4) world-to-camera [R|t].
    """

    intrinsics: np.ndarray
    extrinsics: np.ndarray

    @classmethod
    def looking(cls, position: np.ndarray, target: np.ndarray, focal: float, aspect: float = 1.0) -> "Camera":
        """A camera at `position`, without roll, that has `target` at the image center.

        Args:
          position, target: (3,) in world coordinates; the line between them must not be vertical.
          focal: focal length divided by image height.
          aspect: image width divided by height.
        """
        forward = np.asarray(target, np.float64) - position
        forward /= np.linalg.norm(forward)
        right = np.cross(forward, (0.0, 0.0, 1.0))
        right /= np.linalg.norm(right)
        rotation = np.stack([right, np.cross(forward, right), forward])
        extrinsics = np.concatenate([rotation, -rotation @ np.asarray(position, np.float64)[:, None]], axis=1)
        return cls(np.array([focal / aspect, focal, 0.5, 0.5]), extrinsics)

    @property
    def position(self) -> np.ndarray:
        """Camera center in world coordinates, (3,)."""
        return -self.extrinsics[:, :3].T @ self.extrinsics[:, 3]

    def project(self, points: np.ndarray) -> np.ndarray:
        """World points (..., 3) to (..., 3): x and y normalized by the image size, and depth along the optical axis."""
        return project(points, self.intrinsics, self.extrinsics)


def project(points: np.ndarray, intrinsics: np.ndarray, extrinsics: np.ndarray) -> np.ndarray:
    """World points (..., 3) through one camera ((4,), (3, 4)) to (..., 3): normalized x, y, and depth."""
    x, y, z = np.moveaxis(points @ extrinsics[:, :3].T + extrinsics[:, 3], -1, 0)
    fx, fy, cx, cy = intrinsics
    return np.stack([fx * x / z + cx, fy * y / z + cy, z], axis=-1)


@dataclasses.dataclass(frozen=True)
class Stage:
    """Everything except the bodies.

    Attributes:
      ground, sky_low, sky_high: RGB in 0..1.
      checker: contrast of a checkerboard on the ground, 0 for none.
      checker_size: edge length of its squares.
      light: (3,) unit vector toward the light.
      marker: (x, y, radius) of a bright ring on the ground, or None.
    """

    ground: tuple[float, float, float]
    sky_low: tuple[float, float, float]
    sky_high: tuple[float, float, float]
    checker: float = 0.0
    checker_size: float = 1.0
    light: tuple[float, float, float] = (-0.42, -0.38, 0.824)
    marker: tuple[float, float, float] | None = None


class Renderer:
    """Renders bodies on one stage from one camera. Everything that does not depend on the bodies is precomputed."""

    def __init__(self, stage: Stage, camera: Camera, height: int, width: int, *, samples: int = 2):
        """Cast the rays.

        Args:
          stage: ground, sky and light.
          camera: the camera.
          height, width: image size in pixels.
          samples: rays per pixel along each axis.
        """
        self.stage, self.camera = stage, camera
        self.height, self.width, self.samples = height, width, samples
        x = (np.arange(width * samples) + 0.5) / (width * samples)
        y = (np.arange(height * samples) + 0.5) / (height * samples)
        fx, fy, cx, cy = camera.intrinsics
        # Directions have depth 1 along the optical axis, so the ray parameter is depth.
        local_x, local_y = ((x - cx) / fx)[None, :], ((y - cy) / fy)[:, None]
        rotation = camera.extrinsics[:, :3]
        self._directions: Planes = tuple(
            (rotation[0, axis] * local_x + rotation[1, axis] * local_y + rotation[2, axis]).astype(np.float32)
            for axis in range(3)
        )
        self._origin = camera.position.astype(np.float32)
        down = np.minimum(self._directions[2], -1e-6)
        self._ground_depth = np.where(self._directions[2] < -1e-6, -self._origin[2] / down, np.float32(FAR))
        self._background = self._shade_background()
        self._lights = _lamp(stage.light)
        self._ground_points = self._points_on_ground(samples)

    def frame(self, bodies: list[Body]) -> np.ndarray:
        """The image with these bodies: uint8 (H, W, 3)."""
        pixels = self._background.copy()
        for body in bodies:
            self._cast_shadow(pixels, body)
        depth = self._ground_depth.copy()
        for body in bodies:
            self._draw(pixels, depth, body)
        s = self.samples
        # Strided sums: numpy's mean over two axes is five times slower.
        lines = sum(pixels[row::s] for row in range(s))
        total = sum(lines[:, column::s] for column in range(s))
        return (np.clip(total * np.float32(1.0 / s**2), 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)

    def coverage(self, bodies: list[Body], number: int) -> np.ndarray:
        """Fraction of each pixel, float32 (H, W), in which body `number` is visible."""
        depth = self._ground_depth.copy()
        owner = np.full(depth.shape, -1)
        for index, body in enumerate(bodies):
            window = self._window(body.corners)
            if window is None:
                continue
            hit, _ = intersect(body, self._origin, tuple(d[window] for d in self._directions))
            nearer = hit < depth[window]
            depth[window][nearer] = hit[nearer]
            owner[window][nearer] = index
        s = self.samples
        return (owner == number).reshape(self.height, s, self.width, s).mean(axis=(1, 3), dtype=np.float32)

    def _points_on_ground(self, samples: int) -> Planes:
        """Where the rays through pixel centers hit the ground: x, y (H, W), and whether they do."""

        def middle(plane: np.ndarray) -> np.ndarray:
            lines = sum(plane[row::samples] for row in range(samples))
            return sum(lines[:, column::samples] for column in range(samples)) / np.float32(samples**2)

        dx, dy, dz = (middle(plane) for plane in self._directions)
        seen = dz < -1e-6
        depth = np.where(seen, -self._origin[2] / np.where(seen, dz, np.float32(-1)), np.float32(0))
        return self._origin[0] + depth * dx, self._origin[1] + depth * dy, seen

    def _shade_background(self) -> np.ndarray:
        stage = self.stage
        dx, dy, dz = self._directions
        length = np.sqrt(dx * dx + dy * dy + dz * dz)
        climb = np.clip(dz / length * 2.2, 0.0, 1.0)[..., None]
        low, high = np.float32(stage.sky_low), np.float32(stage.sky_high)
        pixels = low + (high - low) * climb
        seen = self._ground_depth < FAR
        depth = np.where(seen, self._ground_depth, np.float32(0))
        x, y = self._origin[0] + depth * dx, self._origin[1] + depth * dy
        away = depth * length
        # The ground is brightest around the origin and fades toward the horizon.
        glow = 1.0 + 0.07 * np.exp(-(x * x + y * y) / 8.0)
        if stage.checker:
            sharp = 2.5 / (0.15 + away * 0.04)  # wider edges far away, against aliasing
            wave = np.sin(np.pi * x / stage.checker_size) * np.sin(np.pi * y / stage.checker_size)
            glow *= 1.0 + stage.checker * np.tanh(wave * sharp) * np.exp(-away * 0.05)
        ground = np.float32(stage.ground) * glow[..., None]
        if stage.marker is not None:
            mx, my, radius = stage.marker
            ring = np.abs(np.hypot(x - np.float32(mx), y - np.float32(my)) - radius) < 0.28 * radius
            ground = np.where(ring[..., None], np.float32((0.97, 0.97, 0.94)), ground)
        fade = np.exp(-((away / 26.0) ** 2))[..., None]
        ground = low + (ground - low) * fade
        return np.where(seen[..., None], ground, pixels).astype(np.float32)

    def _cast_shadow(self, pixels: np.ndarray, body: Body) -> None:
        light = np.asarray(self.stage.light)
        corners = body.corners
        shadow = corners - corners[:, 2:] / light[2] * light
        rim = np.where(np.sign(corners - body.center) > 0, 0.6, -0.6) * body.radius
        footprint = np.concatenate([shadow + rim * (1, 1, 0), corners * (1, 1, 0) + 1.5 * rim * (1, 1, 0)])
        window = self._window(footprint)
        if window is None:
            return
        s = self.samples
        rows = slice(window[0].start // s, -(-window[0].stop // s))
        columns = slice(window[1].start // s, -(-window[1].stop // s))
        x, y, seen = (plane[rows, columns] for plane in self._ground_points)
        # Shadows are soft, so one point per pixel is enough; the visible fraction of the lamp gives the penumbra.
        # Rays run from the lamp to the ground, so that ground below a body is reached from outside of it.
        lx, ly, lz = np.float32(_LAMP_DISTANCE) * self._lights.T
        hit, _ = intersect(body, (x[..., None] + lx, y[..., None] + ly, lz), tuple(-self._lights.T))
        shade = 1.0 - np.float32(0.4) * (hit < _LAMP_DISTANCE).mean(axis=-1, dtype=np.float32)
        gap = max(0.0, body.center[2] - body.radius)
        beside = np.maximum(
            np.hypot(x - np.float32(body.center[0]), y - np.float32(body.center[1])) - 0.6 * body.radius, 0
        )
        contact = 0.35 * np.exp(-((beside / (0.45 * body.radius)) ** 2)) * np.exp(-4.0 * gap / body.radius)
        shade = np.where(seen, shade * (1.0 - contact), np.float32(1.0)).astype(np.float32)
        shade = shade.repeat(s, axis=0).repeat(s, axis=1)[..., None]
        pixels[rows.start * s : rows.stop * s, columns.start * s : columns.stop * s] *= shade

    def _draw(self, pixels: np.ndarray, depth: np.ndarray, body: Body) -> None:
        window = self._window(body.corners)
        if window is None:
            return
        directions = tuple(d[window] for d in self._directions)
        hit, normal = intersect(body, self._origin, directions)
        nearer = hit < depth[window]
        if not nearer.any():
            return
        nx, ny, nz = (plane[nearer] for plane in normal)
        dx, dy, dz = (plane[nearer] for plane in directions)
        light = np.float32(self.stage.light)
        lambert = np.maximum(nx * light[0] + ny * light[1] + nz * light[2], 0.0)
        away = nx * dx + ny * dy + nz * dz
        length = np.sqrt(dx * dx + dy * dy + dz * dz)
        reflected = [d - 2.0 * away * n for d, n in ((dx, nx), (dy, ny), (dz, nz))]
        gloss = np.maximum(sum(m * l for m, l in zip(reflected, light, strict=True)) / length, 0.0) ** 24
        shade = 0.63 + 0.10 * nz + 0.38 * lambert
        color = np.float32(body.color) * shade[:, None] + np.float32(0.16) * gloss[:, None]
        pixels[window][nearer] = color
        depth[window][nearer] = hit[nearer]

    def _window(self, points: np.ndarray) -> tuple[slice, slice] | None:
        """The samples that the convex hull of some world points can cover; None if outside of the image."""
        x, y, z = np.moveaxis(self.camera.project(points), -1, 0)
        rows, columns = self.height * self.samples, self.width * self.samples
        if (z < NEAR).all():
            return None
        if (z < NEAR).any():
            return slice(0, rows), slice(0, columns)
        left, right = max(0, int(np.floor(x.min() * columns))), min(columns, int(np.ceil(x.max() * columns)) + 1)
        top, bottom = max(0, int(np.floor(y.min() * rows))), min(rows, int(np.ceil(y.max() * rows)) + 1)
        return (slice(top, bottom), slice(left, right)) if left < right and top < bottom else None


@functools.cache
def _lamp(light: tuple[float, float, float]) -> np.ndarray:
    """(16, 3): directions to points of a small disk-shaped lamp around `light`, in a sunflower (Vogel) pattern."""
    axis = np.asarray(light, np.float64)
    side = np.cross(axis, (0.0, 0.0, 1.0))
    side /= np.linalg.norm(side)
    seed = np.arange(16)
    radius, angle = 0.15 * np.sqrt((seed + 0.5) / 16), seed * np.pi * (3.0 - np.sqrt(5.0))
    lamp = axis + np.outer(radius * np.cos(angle), side) + np.outer(radius * np.sin(angle), np.cross(axis, side))
    return lamp.astype(np.float32)
