"""Devices of one TPU slice as a mesh whose sequence axis is a ring of neighbors in the chips' network."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from einops import rearrange
from jax.experimental import mesh_utils

from jvgen.parallel.chips import chip_of
from jvgen.parallel.pods import wraps


def arrange(shape: tuple[int, int, int, int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices of one slice along (data, fsdp, seq, tensor), so that rings of `seq` pass each link once.

    JAX lays a mesh axis along an axis of the torus. Four of sixteen chips of a row are no ring there: the last one's
    message to the first passes three links, and on v5e libtpu makes every message of such a ring wait
    (`tests/unit/test_overlap.py`). Where it is no ring, `seq` is a closed path through a rectangle instead: for
    `seq = 4` 2 x 2 chips, which are also one host, so that hosts do not share examples. JAX's order stays where
    `tensor` is not 1, where no rectangle of so many chips divides the slice, and on chips of two devices.
    """
    found = mesh_utils.create_device_mesh(shape, list(devices), allow_split_physical_axes=True)
    torus = Torus.of(devices)
    if torus is None or shape[2] < 3 or shape[3] > 1 or torus.is_ring(found[0, 0, :, 0]):
        return found
    rectangles = torus.rectangles(shape[2])
    return found if rectangles is None else rectangles.reshape(shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Torus:
    """Devices by their place, one in each place.

    Attributes:
      devices: by coordinates.
      closed: for each axis, whether its ends are neighbors.
    """

    devices: np.ndarray
    closed: tuple[bool, ...]

    @classmethod
    def of(cls, devices: Sequence[jax.Device]) -> "Torus | None":
        """The torus of a slice; None for chips of several devices, and for devices that are no whole box of chips."""
        places = np.array([device.coords for device in devices])
        places -= places.min(axis=0)
        size = tuple((places.max(axis=0) + 1).tolist())
        if math.prod(size) != len(devices) or len({tuple(place) for place in places.tolist()}) != len(devices):
            return None
        by_place = np.empty(size, dtype=object)
        for place, device in zip(places.tolist(), devices, strict=True):
            by_place[tuple(place)] = device
        chip = chip_of(devices[0])
        # A plane's devices have a third coordinate, which is 0.
        plane = size[:2] if size[2:] == (1,) else size
        closed = [chip is not None and wraps(chip.name, plane, axis) for axis in range(len(plane))]
        return cls(by_place, (*closed, *[False] * (len(size) - len(plane))))

    def is_ring(self, devices: Sequence[jax.Device]) -> bool:
        """Whether each device of a sequence is a neighbor of the next, and the last one of the first."""
        first = self.devices.flat[0].coords
        places = np.array([device.coords for device in devices]) - np.array(first)
        steps = np.abs(np.roll(places, -1, axis=0) - places)
        around = np.where(self.closed, np.minimum(steps, np.array(self.devices.shape) - steps), steps)
        return bool(np.all(around.sum(axis=1) == 1))

    def rectangles(self, size: int) -> np.ndarray | None:
        """The devices as (rectangles, size): closed paths through rectangles of so many chips, as square as they fit.

        None if no such rectangle divides the torus.
        """
        lengths = self.devices.shape
        fitting = [
            (abs(rows - size // rows), first, second, rows)
            for first in range(len(lengths))
            for second in range(len(lengths))
            for rows in range(2, size // 2 + 1, 2)
            if first != second and size % rows == 0
            if lengths[first] % rows == 0 and lengths[second] % (size // rows) == 0
        ]
        if not fitting:
            return None
        _, first, second, rows = min(fitting)
        columns = size // rows
        # The axes of the rectangles last.
        board = np.moveaxis(self.devices, (first, second), (-2, -1))
        boxes = rearrange(board, "... (x rows) (y columns) -> (... x y) rows columns", rows=rows, columns=columns)
        along_rows, along_columns = zip(*closed_path(rows, columns), strict=True)
        return boxes[:, along_rows, along_columns]


def closed_path(rows: int, columns: int) -> list[tuple[int, int]]:
    """A closed path through all squares of a board with an even number of rows and at least two columns.

    Along the first row, back and forth through the others without the first column, and home along that column.
    """
    assert rows % 2 == 0 and columns > 1, (rows, columns)
    path = [(0, column) for column in range(columns)]
    for row in range(1, rows):
        inner = range(1, columns)
        path += [(row, column) for column in (reversed(inner) if row % 2 else inner)]
    return path + [(row, 0) for row in range(rows - 1, 0, -1)]
