"""Solids of the scenes, and where rays hit them."""

import dataclasses

import numpy as np

SHAPES = ("ball", "cube", "cylinder", "cone")
NEAR = 1e-3  # smallest valid ray parameter
FAR = 1e9  # ray parameter of a miss

# x, y and z of many points: faster than one array of triples.
Planes = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Body:
    """A solid on or above the ground.

    Attributes:
      shape: one of `SHAPES`.
      color: RGB in 0..1.
      center: (3,) center of its bounding box, in world coordinates.
      radius: half its width; all shapes are as high as wide.
      yaw: rotation about the vertical axis, in radians.
    """

    shape: str
    color: tuple[float, float, float]
    center: np.ndarray
    radius: float
    yaw: float = 0.0

    @property
    def corners(self) -> np.ndarray:
        """(8, 3): corners of an upright bounding box."""
        half = self.radius * (np.sqrt(2.0) if self.shape == "cube" else 1.0)
        signs = np.stack(np.meshgrid([-1, 1], [-1, 1], [-1, 1], indexing="ij"), axis=-1).reshape(8, 3)
        return self.center + signs * np.array([half, half, self.radius])


def intersect(body: Body, origin: Planes | np.ndarray, direction: Planes) -> tuple[np.ndarray, Planes]:
    """First intersection of rays with a body: the ray parameter (`FAR` for a miss) and the outward unit normal."""
    center, radius = np.float32(body.center), np.float32(body.radius)
    ox, oy, oz = (np.asarray(origin[axis]) - center[axis] for axis in range(3))
    dx, dy, dz = direction
    if body.shape == "ball":
        return _ball(ox, oy, oz, dx, dy, dz, radius)
    cos, sin = np.float32(np.cos(body.yaw)), np.float32(np.sin(body.yaw))
    ox, oy = cos * ox + sin * oy, cos * oy - sin * ox
    dx, dy = cos * dx + sin * dy, cos * dy - sin * dx
    shape = {"cube": _cube, "cylinder": _cylinder, "cone": _cone}[body.shape]
    hit, (nx, ny, nz) = shape(ox, oy, oz, dx, dy, dz, radius)
    return hit, (cos * nx - sin * ny, sin * nx + cos * ny, nz)


def _first(candidates: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The smallest valid parameter of several (parameter, valid) pairs."""
    best = np.float32(FAR)
    for parameter, valid in candidates:
        best = np.where(valid & (parameter > NEAR) & (parameter < best), parameter, best)
    return best


def _roots(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both real roots of a t² + 2 b t + c, and where they exist."""
    discriminant = b * b - a * c
    real = discriminant > 0
    root = np.sqrt(np.where(real, discriminant, np.float32(0)))
    a = np.where(np.abs(a) < 1e-9, np.float32(1e-9), a)
    return (-b - root) / a, (-b + root) / a, real


def _ball(ox, oy, oz, dx, dy, dz, radius) -> tuple[np.ndarray, Planes]:
    near, _, real = _roots(
        dx * dx + dy * dy + dz * dz, ox * dx + oy * dy + oz * dz, ox * ox + oy * oy + oz * oz - radius * radius
    )
    hit = _first([(near, real)])
    t = np.where(hit < FAR, hit, np.float32(0))
    return hit, ((ox + t * dx) / radius, (oy + t * dy) / radius, (oz + t * dz) / radius)


def _cube(ox, oy, oz, dx, dy, dz, radius) -> tuple[np.ndarray, Planes]:
    enter, leave, axis = np.float32(-FAR), np.float32(FAR), np.int8(0)
    for number, (o, d) in enumerate(((ox, dx), (oy, dy), (oz, dz))):
        d = np.where(np.abs(d) < 1e-9, np.float32(1e-9), d)
        near = (-np.sign(d) * radius - o) / d
        far = (np.sign(d) * radius - o) / d
        axis = np.where(near > enter, np.int8(number), axis)
        enter, leave = np.maximum(enter, near), np.minimum(leave, far)
    hit = np.where((enter < leave) & (enter > NEAR), enter, np.float32(FAR))
    normal = tuple(np.where(axis == number, -np.sign(d), np.float32(0)) for number, d in enumerate((dx, dy, dz)))
    return hit, normal


def _cylinder(ox, oy, oz, dx, dy, dz, radius) -> tuple[np.ndarray, Planes]:
    near, _, real = _roots(dx * dx + dy * dy, ox * dx + oy * dy, ox * ox + oy * oy - radius * radius)
    side = real & (np.abs(oz + near * dz) <= radius)
    flat = np.where(np.abs(dz) < 1e-9, np.float32(1e-9), dz)
    lid = (-np.sign(dz) * radius - oz) / flat
    capped = (ox + lid * dx) ** 2 + (oy + lid * dy) ** 2 <= radius * radius
    hit = _first([(near, side), (lid, capped)])
    t = np.where(hit < FAR, hit, np.float32(0))
    on_lid = capped & (lid == hit)
    zero = np.float32(0)
    return hit, (
        np.where(on_lid, zero, (ox + t * dx) / radius),
        np.where(on_lid, zero, (oy + t * dy) / radius),
        np.where(on_lid, -np.sign(dz), zero),
    )


def _cone(ox, oy, oz, dx, dy, dz, radius) -> tuple[np.ndarray, Planes]:
    # The radius falls from `radius` at z = -radius to 0 at z = +radius: x² + y² = ((radius - z) / 2)².
    top = (radius - oz) * np.float32(0.5)
    slope = dz * np.float32(0.5)
    first, second, real = _roots(
        dx * dx + dy * dy - slope * slope, ox * dx + oy * dy + slope * top, ox * ox + oy * oy - top * top
    )
    sides = [(t, real & (np.abs(oz + t * dz) <= radius)) for t in (first, second)]
    flat = np.where(np.abs(dz) < 1e-9, np.float32(1e-9), dz)
    base = (-radius - oz) / flat
    # Visible from below only: from above, the base of a cone on the ground would z-fight with the ground.
    capped = ((ox + base * dx) ** 2 + (oy + base * dy) ** 2 <= radius * radius) & (dz > 0)
    hit = _first([*sides, (base, capped)])
    t = np.where(hit < FAR, hit, np.float32(0))
    x, y = ox + t * dx, oy + t * dy
    length = np.maximum(np.sqrt(x * x + y * y), np.float32(1e-6))
    on_base = capped & (base == hit)
    zero = np.float32(0)
    across, up = np.float32(2 / np.sqrt(5)), np.float32(1 / np.sqrt(5))
    return hit, (
        np.where(on_base, zero, across * x / length),
        np.where(on_base, zero, across * y / length),
        np.where(on_base, np.float32(-1), up),
    )
