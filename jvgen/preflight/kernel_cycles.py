"""Cycles of Pallas kernels: libtpu writes the final VLIW bundles of every kernel it compiles, and a bundle is a cycle.

Counted is what the cores issue: the body of a grid step and what surrounds it, times the grid. Waiting for memory is
not in it, so it is the least that a kernel takes.
"""

import base64
import dataclasses
import glob
import math
import os
import re
from pathlib import Path

from jvgen.parallel import jax_internals
from jvgen.preflight.hlo import Module

# jaxlib writes the body first, libtpu in the order of names.
_CALL = re.compile(r'"custom_call_config":\{(?:"\w+":\[[^\]]*\],)*"body":"([^"]*)"')
_ADDRESS = re.compile(r"\s*(0x[0-9a-f]+|\d+)\s+(?:LH|LB|LE|PB|PF|CT)?\s*:")
# Regions below are control flow.
_SMALL = 100
# A region is the body of a grid step if it holds this share of all matrix products of the kernel, or of its share where
# there are several copies of the body: the compiler does not make them alike.
_MOST, _MOST_OF_COPIES = 0.9, 0.8
# Kernels with several copies of their body, of which one runs in each grid step: with and without a mask, with and
# without a running maximum. The shortest is counted.
_COPIES = {"attention_forward": 2, "attention_forward_masked": 4, "attention_backward_masked": 2}
UNITS = "MATMUL MATPUSH XLU VALU VPOP EUP VLOAD FILL VSTORE SPILL SALU".split()


@dataclasses.dataclass(frozen=True)
class Bundles:
    """VLIW bundles of one kernel.

    Attributes:
      step: of every grid step.
      row: of what runs once per row of the grid only (first and last step along the innermost axis).
      use: share of the bundles of a step that use a unit (an entry of `UNITS`), of the slots that a bundle has for it.
      longest_step: of a grid step that takes the longest copy of the body.
    """

    step: int
    row: int
    use: dict[str, float]
    longest_step: int = 0


@dataclasses.dataclass(frozen=True)
class Grid:
    """The grid of a kernel: its sizes, and which axes the TensorCores of a chip may share."""

    sizes: tuple[int, ...]
    parallel: tuple[bool, ...] = ()

    def steps(self, cores: int) -> int:
        """Grid steps of the core that has most, with one parallel axis divided over the cores."""
        total = math.prod(self.sizes)
        shared = [size for size, free in zip(self.sizes, self.parallel, strict=False) if free and size > 1]
        return min((total // size * math.ceil(size / cores) for size in shared), default=total)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of a program: what it is called there, its bundles, its grid."""

    name: str
    bundles: Bundles
    grid: Grid

    def cycles(self, cores: int, longest: bool = False) -> int:
        """Cycles of one call on a device of so many TensorCores; `longest` counts the longest copy of the body."""
        steps, innermost = self.grid.steps(cores), self.grid.sizes[-1] if self.grid.sizes else 1
        step = self.bundles.longest_step if longest else self.bundles.step
        return steps * step + steps // max(1, innermost) * self.bundles.row


def read(module: Module, folder: str | Path) -> dict[str, Kernel]:
    """The kernels of a compiled program, by the name of their instruction, without those that have no files.

    Args:
      module: the program.
      folder: where libtpu has written its files, see `jvgen.parallel.libtpu.writing_bundles`.
    """
    calls = {}
    for inside in module.computations.values():
        for one in inside.values():
            call = _CALL.search(one.rest) if one.operation == "custom-call" else None
            if call is not None:
                calls[one.name] = (one, call.group(1))
    # libtpu compiles a kernel once that is called in several places, and writes it under the name of one of them.
    by_code = {(one.result, body): files for one, body in calls.values() if (files := _files(folder, one.name))}
    found = {}
    for name, (one, body) in calls.items():
        files = by_code.get((one.result, body))
        if files is not None:
            bundles = count(*files, copies=2 if "tokamax" in one.source else _copies(name))
            found[name] = Kernel(name, bundles, grid(base64.b64decode(body)))
    return found


def _copies(name: str) -> int:
    # As "attention_forward.3"; where it is differentiated, as "transpose_jvp_attention_backward_masked__.1".
    kernel = re.search(r"(?<!epipolar_)attention_(forward|backward)(_masked)?", name)
    return _COPIES.get(kernel.group(), 1) if kernel else 1


def grid(body: bytes) -> Grid:
    """The grid of a kernel from its serialized Mosaic module."""
    text = jax_internals.mosaic_text(body)
    sizes = re.search(r"iteration_bounds = array<i64: ([\d, ]+)>", text)
    semantics = re.search(r"dimension_semantics = \[([^\]]*)\]", text)
    return Grid(
        tuple(int(size) for size in sizes.group(1).split(",")) if sizes else (),
        tuple("parallel" in one for one in semantics.group(1).split(", ")) if semantics else (),
    )


def _files(folder: str | Path, name: str) -> tuple[str, str] | None:
    """The bundles and the use of units of an instruction; the newest if it was compiled several times."""
    escaped = glob.escape(name)
    bundles = sorted(glob.glob(f"{glob.escape(str(folder))}/*-{escaped}-*-final_bundles.txt"), key=os.path.getmtime)
    bundles = [file for file in bundles if re.search(rf"\d-{re.escape(name)}-\d\d-final_bundles\.txt$", file)]
    if not bundles:
        return None
    stem = re.sub(r"-\d\d-final_bundles\.txt$", "", bundles[-1])
    usage = glob.glob(f"{glob.escape(stem)}-*utilization.txt")
    return (bundles[-1], usage[0]) if usage else None


def count(bundles_file: str, usage_file: str, copies: int = 1) -> Bundles:
    """Bundles of one grid step: the smallest region with the matrix products, and what is outside of all regions.

    Args:
      bundles_file, usage_file: of libtpu: final bundles, and the use of every unit by bundle.
      copies: copies of the body, of which one runs in each step.
    """
    counted = (line.split() for line in Path(usage_file).read_text().splitlines())
    usage = [[int(word) for word in words] for words in counted if len(words) == len(UNITS) and words[0].isdigit()]
    slots, usage = usage[0], usage[1:]
    begun, regions, address = {}, [], 0
    for line in Path(bundles_file).read_text().splitlines():
        if number := _ADDRESS.match(line):
            address = int(number.group(1), 0)
        for kind, name in re.findall(r"(Start|End) region (\d+)", line):
            if kind == "Start":
                begun[name] = address
            elif name in begun:
                regions.append((begun.pop(name), address))
    regions = [(first, last) for first, last in regions if last - first >= _SMALL]
    products = [row[0] for row in usage]
    wanted = (_MOST if copies == 1 else _MOST_OF_COPIES) * sum(products) / copies
    bodies = [region for region in regions if sum(products[region[0] : region[1] + 1]) >= wanted]
    if not bodies:
        return Bundles(len(usage), 0, _use(usage, slots), len(usage))
    first, last = min(bodies, key=lambda region: region[1] - region[0])
    beside = [region for region in regions if region[1] < first or region[0] > last]
    outer = [r for r in beside if not any(o != r and o[0] <= r[0] and r[1] <= o[1] for o in beside)]
    sizes = {True: 0, False: 0}
    for region in outer:
        sizes[region in bodies] += region[1] - region[0]
    # Other copies of the body do not run in this step.
    step = len(usage) - sizes[True] - sizes[False]
    # A body may have regions around it, of which each has all products too.
    apart = [region for region in bodies if region == (first, last) or region in outer]
    longer = max(region[1] - region[0] for region in apart) - (last - first)
    return Bundles(step, sizes[False], _use(usage[first : last + 1], slots), step + longer)


def _use(rows: list[list[int]], slots: list[int]) -> dict[str, float]:
    busy = [sum(column) for column in zip(*rows, strict=True)] or [0] * len(UNITS)
    return {unit: used / (len(rows) or 1) / (have or 1) for unit, used, have in zip(UNITS, busy, slots, strict=True)}
