"""The text of an optimized HLO module (`compiled.as_text()`) as data: computations, instructions, trip counts."""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterator

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}
BYTES |= {name: 4 for name in ("f32", "s32", "u32")} | {name: 1 for name in ("s8", "u8", "f8e4m3fn", "f8e5m2")}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-<>]+) (?:\([^\n]*\) -> [^\n]* )?\{")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-<>]+) = (.*?) ([a-z][\w\-]*)\((.*)$", re.DOTALL)
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^{}]*\})?")
_CALLED = re.compile(
    r"\b(calls|to_apply|condition|body|branch_computations|called_computations)=(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_TILE = re.compile(r"^\{([\d,]*):T\(([\d,]+)\)")
# Memory spaces of layouts: S(1) is VMEM, S(2) and above are semaphores, scalars and the host.
_OFF_HBM = re.compile(r"S\([1-9]\)")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array: element type, dimensions, layout as written ("{1,0:T(8,128)(2,1)S(1)}", "" where there is none)."""

    element: str
    dimensions: tuple[int, ...]
    layout: str = ""

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.dimensions)

    @property
    def bytes(self) -> float:
        """Bytes without padding."""
        return BYTES.get(self.element, 4) * self.elements

    @property
    def in_hbm(self) -> bool:
        """Whether it lies in the device's main memory, not in VMEM or in semaphores."""
        return not _OFF_HBM.search(self.layout)

    @property
    def hbm_bytes(self) -> float:
        """Bytes in main memory as the layout's tiles pad them; 0 for arrays elsewhere."""
        if not self.in_hbm:
            return 0.0
        sizes, tiles = list(self.dimensions), _TILE.match(self.layout)
        if tiles and sizes:
            order = [int(n) for n in tiles.group(1).split(",") if n]
            for dimension, tile in zip(order, reversed(tiles.group(2).split(",")), strict=False):
                sizes[dimension] = -(-sizes[dimension] // int(tile)) * int(tile)
        return BYTES.get(self.element, 4) * math.prod(sizes)

    def __str__(self) -> str:
        return f"{self.element}[{','.join(map(str, self.dimensions))}]"


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """One instruction.

    Attributes:
      name, operation: such as "fusion.3" and "fusion".
      computation: name of the computation it is in.
      is_root: whether it is the result of its computation.
      result: text of its result's type.
      rest: text after the opening parenthesis of its operands.
    """

    name: str
    operation: str
    computation: str
    is_root: bool
    result: str
    rest: str

    @functools.cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """Arrays of the result; several for a tuple."""
        return tuple(shapes(self.result))

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the operands."""
        depth = 1
        for position, letter in enumerate(self.rest):
            depth += (letter in "([{") - (letter in ")]}")
            if depth == 0:
                return tuple(re.findall(r"%([\w.\-<>]+)", self.rest[:position]))
        return ()

    @functools.cached_property
    def source(self) -> str:
        """The `op_name` that JAX gave it; "" if none."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found.group(1) if found else ""

    @functools.cached_property
    def called(self) -> tuple[tuple[str, str], ...]:
        """(how, name) of every computation it calls, how being "calls", "body", "condition", ..."""
        return tuple(
            (how, name.strip().lstrip("%"))
            for how, several, one in _CALLED.findall(self.rest)
            for name in (several or one).split(",")
        )

    @property
    def estimated_cycles(self) -> int | None:
        """XLA's own estimate, None if it has none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(found.group(1)) if found else None

    def called_as(self, how: str) -> str:
        """Name of the computation that it calls as "calls", "body" ...; "" if none."""
        return next((name for found, name in self.called if found == how), "")


@dataclasses.dataclass(frozen=True)
class Module:
    """A module: instructions by computation (in the order of the schedule), and the name of the entry computation."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    def trip_count(self, loop: Instruction) -> int:
        """How often a `while` runs: the compiler's annotation, else the bound that its condition compares with."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
        if known:
            return int(known.group(1))
        inside = self.computations.get(loop.called_as("condition"), {}).values()
        bounds = [re.match(r"(\d+)\)", one.rest) for one in inside if one.operation == "constant"]
        return max((int(bound.group(1)) for bound in bounds if bound), default=1)

    def executions(self) -> dict[str, int]:
        """How often each computation runs per step: its callers' counts, times the trip counts of loops."""
        counts: dict[str, int] = defaultdict(int)

        def visit(computation: str, factor: int) -> None:
            counts[computation] += factor
            for one in self.computations.get(computation, {}).values():
                trips = self.trip_count(one) if one.operation == "while" else 1
                for _, name in one.called:
                    visit(name, factor * trips)

        if self.entry:
            visit(self.entry, 1)
        return counts

    def blocks(self) -> Iterator[tuple[list[Instruction], int, tuple[int, ...]]]:
        """Straight runs of instructions as a device executes them, fusions not entered.

        Yields:
          The instructions of one computation (entry, body of a loop, branch), how often it runs per step, and the trip
          counts of the loops around it, the outermost first. Of a conditional every branch is yielded: an upper bound.
        """

        def visit(computation: str, factor: int, loops: tuple[int, ...]):
            inside = list(self.computations.get(computation, {}).values())
            yield inside, factor, loops
            for one in inside:
                if one.operation == "while":
                    trips = self.trip_count(one)
                    yield from visit(one.called_as("body"), factor * trips, (*loops, trips))
                elif one.operation in ("conditional", "call"):
                    for _, name in one.called:
                        yield from visit(name, factor, loops)

        yield from visit(self.entry, 1, ())


def goes_on(module: Module, computation: str) -> bool:
    """Whether a computation carries on, or ends, an asynchronous collective that another one has started."""
    return "async_collective_fusion" in computation or _calls(module, computation, "AsyncCollectiveDone")


def starts(module: Module, computation: str) -> bool:
    """Whether a fusion's computation starts an asynchronous collective that the fusions after it carry on."""
    return _calls(module, computation, "AsyncCollectiveStart")


def chain(module: Module, one: Instruction) -> list[Instruction]:
    """An instruction, and if it carries on or ends something asynchronous what came before it, to the `async-start`."""
    found, inside = [one], module.computations[one.computation]
    while found[-1].operation in ("async-update", "async-done") and found[-1].operands:
        earlier = inside.get(found[-1].operands[0])
        if earlier is None:
            break
        found.append(earlier)
    return found


def begins_to_work(links: list[Instruction]) -> Instruction:
    """Of a chain the instruction from which on it works: the first with operands.

    On a SparseCore an `async-start` without any loads the program, and the `async-update` after it brings the arrays.
    """
    return next((one for one in reversed(links) if one.operands), links[-1])


def started_by(module: Module, one: Instruction) -> str:
    """Name of the instruction that started what this one waits for or carries on; "" if it waits for nothing."""
    if one.operation in ("async-update", "async-done"):
        start = begins_to_work(chain(module, one))
        return "" if start is one else start.name
    if one.operation.endswith("-done"):
        return one.operands[0] if one.operands else ""
    if one.operation != "fusion" or not _calls(module, one.called_as("calls"), "AsyncCollectiveDone"):
        return ""
    inside, waiting, seen = module.computations[one.computation], list(one.operands), set()
    while waiting:
        name = waiting.pop()
        other = inside.get(name)
        if other is None or name in seen:
            continue
        seen.add(name)
        if starts(module, other.called_as("calls")):
            return name
        if other.operation in ("get-tuple-element", "bitcast", "tuple") or goes_on(module, other.called_as("calls")):
            waiting += other.operands
    return ""


def _calls(module: Module, computation: str, target: str) -> bool:
    inside = module.computations.get(computation, {}).values()
    return any(one.operation == "custom-call" and f'"{target}"' in one.rest for one in inside)


def shapes(text: str) -> list[Shape]:
    """All array types in a text, such as "(bf16[2,3]{1,0:T(8,128)}, u32[])"."""
    return [
        Shape(element, tuple(int(n) for n in dimensions.split(",") if n), layout)
        for element, dimensions, layout in _SHAPE.findall(text)
    ]


def group_size(instruction: Instruction) -> int:
    """Number of devices in one group of a collective; 1 where the text does not say."""
    groups = _groups_text(instruction.rest)
    if groups is None:
        return 1
    kind, found = groups
    if kind == "listed":
        return len(found.group(1).split(","))
    if kind == "iota":
        return int(found.group(1))
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", found.group(1)))
    return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", found.group(2)))


def first_group(instruction: Instruction) -> tuple[int, ...]:
    """Numbers of the devices in the first group of a collective (the first pair of a permute); () if not said."""
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}", instruction.rest)
    if pairs:
        chosen = [pair for pair in re.findall(r"(\d+),(\d+)", pairs.group(1)) if pair[0] != pair[1]]
        return tuple(int(n) for n in chosen[0]) if chosen else ()
    groups = _groups_text(instruction.rest)
    if groups is None:
        return ()
    kind, found = groups
    if kind == "listed":
        return tuple(int(n) for n in found.group(1).split(",") if n)
    if kind == "iota":
        return _iota_group(instruction.rest)
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found.group(1))}
    chosen = re.findall(r"'(\w+)'", found.group(2))
    members, stride = [0], 1
    for name, size in reversed(sizes.items()):
        if name in chosen:
            members = [member + step * stride for member in members for step in range(size)]
        stride *= size
    return tuple(sorted(members))


def _groups_text(rest: str) -> tuple[str, re.Match] | None:
    patterns = {
        "listed": r"replica_groups=\{\{([\d,]*)\}",
        "iota": r"replica_groups=\[\d+,(\d+)\]",
        "mesh": r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}",
    }
    for kind, pattern in patterns.items():
        if found := re.search(pattern, rest):
            return kind, found
    return None


def _iota_group(rest: str) -> tuple[int, ...]:
    """The first group of "[groups,size]<=[a,b,...]T(...)": an arange, reshaped, transposed, reshaped."""
    found = re.search(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if not found:
        return ()
    size, sizes = int(found.group(1)), [int(n) for n in found.group(2).split(",")]
    order = [int(n) for n in found.group(3).split(",")] if found.group(3) else list(range(len(sizes)))
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    members = []
    for number in range(size):
        place = 0
        for axis in reversed(order):
            number, position = divmod(number, sizes[axis])
            place += position * strides[axis]
        members.append(place)
    return tuple(members)


def parse(text: str) -> Module:
    """Read a module. Instructions whose attributes go over several lines are joined."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current, pending = "", "", []

    def finish() -> None:
        if pending and (found := _INSTRUCTION.match("\n".join(pending))):
            root, name, result, operation, rest = found.groups()
            computations[current][name] = Instruction(name, operation, current, bool(root), result, rest)
        pending.clear()

    for line in text.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            finish()
            current = start.group(2)
            computations.setdefault(current, {})
            entry = current if start.group(1) else entry
        elif line == "}":
            finish()
            current = ""
        elif current and _INSTRUCTION.match(line):
            finish()
            pending.append(line)
        elif current and pending:
            pending.append(line)
    finish()
    return Module(computations, entry)
