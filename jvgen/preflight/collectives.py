"""The collectives of a compiled program: kind, bytes, and how often each runs."""

import dataclasses

from jvgen.preflight import hlo
from jvgen.preflight.hlo import Instruction, Module, Shape

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of collective on one shape of array.

    Attributes:
      kind: "all-gather", "all-reduce", "reduce-scatter", "all-to-all" or "collective-permute".
      shape: dtype and shape of the whole array (before a scatter, after a gather); the largest if it has several.
      count: ops per step; those in a loop count once per iteration.
      bytes: per op and device, over all its arrays.
      source: the `op_name` in the HLO text.
      devices: number of devices that exchange data with each other in one op; 1 where the text does not say.
    """

    kind: str
    shape: str
    count: int
    bytes: float
    source: str = ""
    devices: int = 1

    @property
    def total(self) -> float:
        """Bytes per device per step."""
        return self.count * self.bytes


def read(program: str | Module) -> list[Collective]:
    """The collectives of an optimized HLO module (or its text, `compiled.as_text()`), largest total first."""
    module = hlo.parse(program) if isinstance(program, str) else program
    executions = module.executions()
    found = []
    for computation, inside in module.computations.items():
        # An asynchronous collective appears in a chain of fusions; only the first one counts.
        if not executions.get(computation) or hlo.goes_on(module, computation):
            continue
        for one in inside.values():
            kind, arrays = one.operation.removesuffix("-start"), exchanged(one)
            if kind not in KINDS or not arrays:
                continue
            size = sum(array.bytes for array in arrays)
            if kind == "reduce-scatter":
                size *= hlo.group_size(one)
            elif kind == "all-reduce" and "reduce-scatter" in computation:
                # XLA's TPU backend writes a reduce-scatter as an all-reduce in a fusion that keeps a slice.
                kind = "reduce-scatter"
            largest = max(arrays, key=lambda array: array.bytes)
            shape = str(largest) + (f" and {len(arrays) - 1} more" if len(arrays) > 1 else "")
            found.append(Collective(kind, shape, executions[computation], size, one.source, hlo.group_size(one)))
    return sorted(found, key=lambda c: (-c.total, c.kind, c.shape))


def exchanged(one: Instruction) -> tuple[Shape, ...]:
    """The arrays that a collective results in. What starts one results in operands, results and counters."""
    if not one.operation.endswith("-start"):
        return one.shapes
    return one.shapes[:1] if one.operation.startswith("collective-permute") else one.shapes[len(one.shapes) // 2 :]


def merged(collectives: list[Collective]) -> list[Collective]:
    """The same, with the counts of collectives of equal kind and shape added up."""
    groups: dict[tuple[str, str], Collective] = {}
    for one in collectives:
        key = (one.kind, one.shape)
        count = one.count + (groups[key].count if key in groups else 0)
        groups[key] = dataclasses.replace(groups.get(key, one), count=count)
    return sorted(groups.values(), key=lambda c: (-c.total, c.kind, c.shape))
