"""The collectives of a compiled program, read from its HLO text: kind, bytes, and how often each runs."""

import dataclasses
import math
import re
from collections import defaultdict

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}
BYTES |= {name: 4 for name in ("f32", "s32", "u32")} | {name: 1 for name in ("s8", "u8", "f8e4m3fn", "f8e5m2")}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\([^\n]*\) -> [^\n]* )?\{")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|condition|body|branch_computations)=(?:\{([^}]*)\}|%?([\w.\-]+))")


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


def read(text: str) -> list[Collective]:
    """The collectives in the text of an optimized HLO module (`compiled.as_text()`), largest total first."""
    computations = _computations(text)
    executions = _executions(text, computations)
    found = []
    for computation, lines in computations.items():
        # An asynchronous collective appears in a chain of fusions; only the first one counts.
        if "async_collective_fusion" in computation or any("AsyncCollectiveDone" in line for line in lines):
            continue
        for line in lines:
            match = _INSTRUCTION.match(line)
            if match is None or not executions.get(computation):
                continue
            result, operation, rest = match.groups()
            kind = operation.removesuffix("-start")
            shapes = _SHAPE.findall(result)
            if kind not in KINDS or not shapes:
                continue
            if operation.endswith("-start"):
                # The result holds operands and results (and, for permutes, two counters).
                shapes = shapes[:1] if kind == "collective-permute" else shapes[len(shapes) // 2 :]
            size = sum(_bytes(*shape) for shape in shapes)
            if kind == "reduce-scatter":
                size *= _group_size(rest)
            elif kind == "all-reduce" and "reduce-scatter" in computation:
                # XLA's TPU backend writes a reduce-scatter as an all-reduce in a fusion that keeps a slice.
                kind = "reduce-scatter"
            element, dimensions = max(shapes, key=lambda shape: _bytes(*shape))
            shape = f"{element}[{dimensions}]" + (f" and {len(shapes) - 1} more" if len(shapes) > 1 else "")
            source = re.search(r'op_name="([^"]*)"', rest)
            name, devices = source.group(1) if source else "", _group_size(rest)
            found.append(Collective(kind, shape, executions[computation], size, name, devices))
    return sorted(found, key=lambda c: (-c.total, c.kind, c.shape))


def merged(collectives: list[Collective]) -> list[Collective]:
    """The same, with the counts of collectives of equal kind and shape added up."""
    groups: dict[tuple[str, str], Collective] = {}
    for one in collectives:
        key = (one.kind, one.shape)
        count = one.count + (groups[key].count if key in groups else 0)
        groups[key] = dataclasses.replace(groups.get(key, one), count=count)
    return sorted(groups.values(), key=lambda c: (-c.total, c.kind, c.shape))


def _bytes(kind: str, dimensions: str) -> float:
    return BYTES.get(kind, 4) * math.prod(int(n) for n in dimensions.split(",") if n)


def _group_size(rest: str) -> int:
    """Number of devices in one group of a collective."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    if listed:
        return len(listed.group(1).split(","))
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", rest)
    if iota:
        return int(iota.group(1))
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", rest)
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh.group(1)))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", mesh.group(2)))
    return 1


def _computations(text: str) -> dict[str, list[str]]:
    """Instruction lines by computation."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            lines = computations.setdefault(start.group(1), [])
        elif line.startswith((" ", "\t")):
            lines.append(line)
    return computations


def _executions(text: str, computations: dict[str, list[str]]) -> dict[str, int]:
    """How often each computation runs per step: its callers' counts, times the trip counts of loops."""
    executions: dict[str, int] = defaultdict(int)

    def visit(computation: str, factor: int) -> None:
        executions[computation] += factor
        for line in computations.get(computation, ()):
            groups = _CALLED.findall(line)
            trips = _trip_count(line, computations) if groups and " while(" in line else 1
            for several, one in groups:
                for called in (several or one).split(","):
                    visit(called.strip().lstrip("%"), factor * trips)

    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    if entry:
        visit(entry.group(1), 1)
    return executions


def _trip_count(line: str, computations: dict[str, list[str]]) -> int:
    """Trip count of a `while`: the compiler's annotation, else the bound that its condition compares with."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
    if known:
        return int(known.group(1))
    condition = re.search(r"\bcondition=%?([\w.\-]+)", line)
    bounds = re.findall(r"constant\((\d+)\)", "\n".join(computations.get(condition.group(1), ()))) if condition else []
    return max((int(bound) for bound in bounds), default=1)
