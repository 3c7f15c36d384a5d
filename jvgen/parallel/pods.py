"""TPU slices: the shapes in which each generation comes, and how many chips and hosts a slice has."""

import dataclasses
import math

from jvgen.config import ConfigError
from jvgen.parallel.chips import Chip, chip_named

# Hosts of 4 chips. v5e and v6e are also offered with 8 chips in one host, which libtpu does not describe.
CHIPS_PER_HOST = 4


@dataclasses.dataclass(frozen=True)
class SliceShapes:
    """In what shapes the slices of a generation come.

    Attributes:
      shapes: all shapes of a plane; the shapes below one cube of 4x4x4 of a 3-D torus.
      max_cubes: most cubes of 4x4x4 in a slice of a 3-D torus; 0 for a plane.
      cloud_name: what Cloud TPU calls a slice, with `{}` for the number in it; none where a slice has no such name.
      counts_cores: whether that number counts TensorCores, two per chip, instead of chips.
    """

    shapes: tuple[str, ...]
    max_cubes: int = 0
    cloud_name: str | None = None
    counts_cores: bool = False

    def name_of(self, chips: int) -> str | None:
        """What Cloud TPU calls a slice of so many chips: "v5p-256" for 128 chips (v5p:4x4x8)."""
        return self.cloud_name and self.cloud_name.format(chips * 2 if self.counts_cores else chips)

    @property
    def is_plane(self) -> bool:
        """Whether slices have two dimensions and not three."""
        return not self.max_cubes

    def __contains__(self, shape: tuple[int, ...]) -> bool:
        if "x".join(map(str, shape)) in self.shapes:
            return True
        whole = len(shape) == 3 and all(size % 4 == 0 for size in shape) and list(shape) == sorted(shape)
        return whole and math.prod(shape) <= 64 * self.max_cubes

    def __str__(self) -> str:
        listed = ", ".join(self.shapes)
        if self.is_plane:
            return listed
        return f"{listed}, or three ascending multiples of 4 (4x4x4, 4x4x8, ...) of at most {self.max_cubes * 64} chips"


_PLANE = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SMALL_TORUS = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
SLICES = {
    "v4": SliceShapes(SMALL_TORUS, 64, "v4-{}", counts_cores=True),
    "v5e": SliceShapes(_PLANE, 0, "v5litepod-{}"),
    "v5p": SliceShapes(SMALL_TORUS, 140, "v5p-{}", counts_cores=True),
    "v6e": SliceShapes(_PLANE, 0, "v6e-{}"),
    "tpu7x": SliceShapes(SMALL_TORUS, max_cubes=144),
}
EXAMPLES = "v5e:16x16, v5p:4x4x8, v6e:16x16 or tpu7x:4x4x4"


@dataclasses.dataclass(frozen=True)
class Pod:
    """One TPU slice, or several equal ones.

    Attributes:
      chip: kind of chip.
      shape: of a slice, in chips.
      slices: number of slices, which reach each other over the data center's network.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        """As it is written: "v5p:4x4x8", and "2 x v5p:4x4x8" for two slices."""
        return (f"{self.slices} x " if self.slices > 1 else "") + self.topology

    @property
    def topology(self) -> str:
        """One slice, as it is written: "v5p:4x4x8"."""
        return f"{self.chip.name}:{self.text}"

    @property
    def text(self) -> str:
        """The shape alone: "4x4x8"."""
        return "x".join(map(str, self.shape))

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """JAX devices of all slices."""
        return self.chips * self.chip.devices

    @property
    def hosts_per_slice(self) -> int:
        """Hosts of one slice, with one process each."""
        return math.prod(self.shape) // CHIPS_PER_HOST

    @property
    def hosts(self) -> int:
        """Hosts of all slices."""
        return self.hosts_per_slice * self.slices


def pod_named(topology: str, slices: int = 1) -> Pod:
    """The pod `GENERATION:SHAPE` (one slice), as often as there are slices. Nothing is asked of libtpu.

    Raises:
      ConfigError: an unknown generation, a shape in which it does not come, or fewer than one slice.
    """
    generation, separator, text = topology.partition(":")
    sizes = text.split("x")
    if not separator or not all(size.isascii() and size.isdecimal() and len(size) < 6 for size in sizes):
        raise ConfigError(f"topology {topology!r}: write GENERATION:SHAPE, for example {EXAMPLES}.")
    if generation.lower() not in SLICES:
        raise ConfigError(
            f"topology {topology!r}: {generation!r} is not a TPU generation; there are {', '.join(SLICES)}. Other "
            "devices cannot be described: check on a machine that has them, without a topology."
        )
    chip, shape = chip_named(generation), tuple(int(size) for size in sizes)
    check_shape(chip, shape, f"topology {topology!r}")
    if slices < 1:
        raise ConfigError(f"slices = {slices}: a run needs at least one slice.")
    return Pod(chip, shape, slices)


def slice_of(topology: str) -> str:
    """A slice with its chips and its name in Cloud TPU: "v5p:4x4x8 has 128 chips (Cloud TPU v5p-256)"."""
    pod = pod_named(topology)
    name = SLICES[pod.chip.name].name_of(pod.chips)
    return f"{pod.topology} has {pod.chips} chips" + (f" (Cloud TPU {name})" if name else "")


def wraps(generation: str, shape: tuple[int, ...], axis: int) -> bool:
    """Whether the chips along one axis of a slice are a ring: whole cubes of a 3-D torus, 16 chips of a plane."""
    shapes = SLICES.get(generation)
    if shapes is None:
        return False
    if shapes.is_plane:
        return shape[axis] == 16
    return all(size % 4 == 0 for size in shape)


def check_shape(chip: Chip, shape: tuple[int, ...], written: str) -> None:
    """Raise `ConfigError`, which begins with what was written, for a shape in which slices of a chip do not come."""
    shapes = SLICES[chip.name]
    if shape not in shapes:
        turned = tuple(sorted(shape))
        hint = f" Did you mean {'x'.join(map(str, turned))}?" if turned in shapes else ""
        raise ConfigError(f"{written}: a slice of {chip.name} comes as {shapes}.{hint}")
