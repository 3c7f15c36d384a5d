"""What a compiled TPU program does in a step, operation by operation: FLOPs, bytes of main memory, what is sent."""

import dataclasses
import enum
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping

from jvgen.nn.network import FROZEN_SCOPE
from jvgen.preflight import collectives, hlo
from jvgen.preflight.hlo import Instruction, Module, Shape

_KERNEL = 'custom_call_target="tpu_custom_call"'
_COPIES = frozenset({"copy", "slice", "reshape", "concatenate", "transpose", "pad", "bitcast-convert", "reverse"})
_INT8 = frozenset({"s8", "u8"})
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id opt-barrier domain "
    "add-dependency while conditional call".split()
)


class Kind(enum.StrEnum):
    """What an operation keeps busy."""

    KERNEL = "kernel"
    PRODUCT = "matrix product"
    COPY = "layout copy"
    ELEMENTWISE = "elementwise"
    COLLECTIVE = "collective"
    TRANSFER = "transfer between HBM and VMEM"


class Phase(enum.StrEnum):
    """Part of the step, by the names that JAX gives to what it transforms."""

    FORWARD = "forward"
    BACKWARD = "backward"
    REMAT = "remat"
    FROZEN = "frozen networks"
    UPDATE = "update"


@dataclasses.dataclass(frozen=True)
class Sent:
    """What a collective sends.

    Attributes:
      kind: "all-gather", "all-reduce", "reduce-scatter", "all-to-all" or "collective-permute".
      bytes: of the whole array (before a scatter, after a gather), per device.
      group: numbers of the devices that exchange data, in the order of the program's devices; () if not known.
      size: how many these are; 1 if not known.
      links: links of a device that the compiler's algorithm uses at the same time; 0 if it does not say.
    """

    kind: str
    bytes: float
    group: tuple[int, ...]
    size: int
    links: int = 0


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation on a device's queue.

    Attributes:
      name: of the instruction.
      kind, phase: what it keeps busy, and in which part of the step.
      times: how often a step runs it.
      flops: of its matrix products, for one execution; 0 for kernels, whose products XLA does not see.
      int8_flops: those of them whose operands are both integers of 8 bits.
      bytes: of main memory that it reads and writes in one execution, tiles padded, slices counted as slices.
      cycles: XLA's estimate of one execution; None if it has none.
      sent: what a collective sends; None for others.
      start: name of the operation that started it, if this one waits for its end ("-done"), else "".
      is_start: whether it starts something that goes on beside the next operations ("-start").
      block: number of the straight run of operations that it is in.
      text: shape of its result and where it comes from, for people.
    """

    name: str
    kind: Kind
    phase: Phase
    times: int
    flops: float = 0.0
    int8_flops: float = 0.0
    bytes: float = 0.0
    cycles: int | None = None
    sent: Sent | None = None
    start: str = ""
    is_start: bool = False
    block: int = 0
    text: str = ""


def operations(module: Module) -> list[Operation]:
    """Every operation of a step that takes time, in the order of the schedule, block by block."""
    found = []
    for number, (block, times, _) in enumerate(module.blocks()):
        for one in block:
            if one.operation in _FREE or (one.operation == "custom-call" and _KERNEL not in one.rest):
                continue
            found.append(dataclasses.replace(_operation(module, one), times=times, block=number))
    return found


def _operation(module: Module, one: Instruction) -> Operation:
    inner = _collective_inside(module, one)
    made = Operation(
        name=one.name,
        kind=Kind.ELEMENTWISE,
        phase=phase(inner.source if inner is not None and inner.source else one.source),
        times=1,
        cycles=one.estimated_cycles,
        start=hlo.started_by(module, one),
        is_start=one.operation.endswith(("-start", "-update")),
        text=f"{one.result.partition('{')[0].lstrip('(')} {one.source}",
    )
    if made.start:
        return dataclasses.replace(made, kind=Kind.TRANSFER)
    if inner is not None:
        start = made.is_start or hlo.starts(module, one.called_as("calls"))
        return dataclasses.replace(made, kind=Kind.COLLECTIVE, sent=_sent(inner, one), is_start=start)
    if made.is_start:
        # Result: (destination, source, semaphore); what has no operands yet moves nothing.
        size = max((shape.hbm_bytes for shape in one.shapes[:2]), default=0.0) if one.operands else 0.0
        return dataclasses.replace(made, kind=Kind.TRANSFER, bytes=size)
    if one.operation == "custom-call":
        return dataclasses.replace(made, kind=Kind.KERNEL, bytes=_plain_bytes(module, one))
    flops, int8_flops = product_flops(module, one), product_flops(module, one, of=_INT8)
    kind = Kind.PRODUCT if flops else Kind.COPY if one.operation in _COPIES else Kind.ELEMENTWISE
    return dataclasses.replace(made, kind=kind, flops=flops, int8_flops=int8_flops, bytes=moved_bytes(module, one))


def phase(source: str) -> Phase:
    """The part of the step that an `op_name` belongs to."""
    if f"/{FROZEN_SCOPE}/" in source or f"({FROZEN_SCOPE})" in source:
        return Phase.FROZEN
    if "rematted_computation" in source:
        return Phase.REMAT
    if "transpose(" in source:
        return Phase.BACKWARD
    return Phase.FORWARD if "jvp(" in source else Phase.UPDATE


def _collective_inside(module: Module, one: Instruction) -> Instruction | None:
    """The collective that an operation is or holds (in a fusion, or in a computation on its own queue)."""
    if one.operation.removesuffix("-start") in collectives.KINDS:
        return one
    if one.operation == "fusion":
        called = one.called_as("calls")
        return None if hlo.goes_on(module, called) else _collective_of(module, called)
    links = hlo.chain(module, one)
    if links[-1].operation != "async-start" or not one.operands or hlo.begins_to_work(links) is not one:
        return None
    return _collective_of(module, links[-1].called_as("calls"))


def _collective_of(module: Module, computation: str) -> Instruction | None:
    """The first collective of a computation and of those that it calls."""
    for one in module.computations.get(computation, {}).values():
        if one.operation.removesuffix("-start") in collectives.KINDS:
            return one
        for _, called in one.called:
            found = _collective_of(module, called)
            if found is not None:
                return found
    return None


def _sent(inner: Instruction, outer: Instruction) -> Sent:
    kind, size = inner.operation.removesuffix("-start"), hlo.group_size(inner)
    total = sum(array.bytes for array in collectives.exchanged(inner))
    if kind == "reduce-scatter":
        total *= size
    elif kind == "all-reduce" and "reduce-scatter" in outer.called_as("calls"):
        # XLA's TPU backend writes a reduce-scatter as an all-reduce in a fusion that keeps a slice.
        kind = "reduce-scatter"
    return Sent(kind, total, hlo.first_group(inner), size, _links(inner.rest) or _links(outer.rest))


def _links(text: str) -> int:
    """Links that an all-reduce's rings use, which XLA calls colors: each in one direction, or in both."""
    # On SparseCores: the rings of each color one after the other, those of different colors at the same time.
    rings = re.findall(r'"phase_rings":\[\{[^{}]*"ring_type":"ICI_RING_TYPE_(UNIDIR)?', text)
    if rings:
        return sum(1 if direction else 2 for direction in rings)
    found = re.search(r'"strategy":"(\w+)","debug":"[^"]*?colors:(\d+)', text)
    if not found:
        return 0
    return int(found.group(2)) * (1 if found.group(1).startswith("UniDirection") else 2)


def product_flops(module: Module, one: Instruction, of: frozenset[str] = frozenset()) -> float:
    """FLOPs of the matrix products and convolutions in one operation, fusions entered.

    Args:
      of: element types of both operands; empty for all.
    """
    inside = module.computations[one.computation]
    if one.operation in ("convolution", "dot"):
        types = {inside[name].shapes[0].element for name in one.operands[:2] if name in inside and inside[name].shapes}
        return _product(one, inside) if not of or types <= of else 0.0
    if one.operation not in ("fusion", "async-start"):
        return 0.0
    inner = module.computations.get(one.called_as("calls"), {}).values()
    return sum(product_flops(module, other, of) for other in inner)


def _product(one: Instruction, inside: Mapping[str, Instruction]) -> float:
    operands = [inside[name].shapes[0] for name in one.operands[:2] if name in inside and inside[name].shapes]
    if len(operands) < 2 or not one.shapes:
        return 0.0
    left, right, result = *operands, one.shapes[0]
    if one.operation == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
        summed = math.prod(left.dimensions[int(axis)] for axis in axes.group(1).split(",") if axis) if axes else 1
        return 2.0 * result.elements * summed
    labels = re.search(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", one.rest)
    if not labels or "i" not in labels.group(2):
        return 0.0
    names, kernel, outputs = labels.groups()
    flops = 2.0 * result.elements * right.dimensions[kernel.index("i")]
    window = re.search(r"window=\{([^}]*)\}", one.rest)
    for axis in filter(str.isdigit, kernel):
        sizes = (left.dimensions[names.index(axis)], right.dimensions[kernel.index(axis)])
        flops *= _taps(window.group(1) if window else "", int(axis), *sizes, result.dimensions[outputs.index(axis)])
    return flops


def _taps(window: str, axis: int, length: int, taps: int, outputs: int) -> float:
    """Kernel positions per output along one axis that meet real input: XLA writes batched products as convolutions."""

    def setting(name: str, default: str) -> str:
        found = re.search(rf"\b{name}=([\d_x\-]+)", window)
        return found.group(1).split("x")[axis] if found else default

    before = int(setting("pad", "0_0").split("_")[0])
    stride, spread, dilation = (int(setting(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    if outputs * taps > 4_000_000:
        return taps
    met = 0
    for output in range(outputs):
        for tap in range(taps):
            position = output * stride + tap * dilation - before
            met += position >= 0 and position % spread == 0 and position // spread < length
    return met / outputs


def moved_bytes(module: Module, one: Instruction) -> float:
    """Bytes of main memory that one operation reads and writes: slices as slices, VMEM not, tiles padded."""
    if one.operation == "fusion":
        return _fusion_bytes(module, one)
    inside = module.computations[one.computation]
    if one.operation in ("dynamic-slice", "slice"):
        return 2 * _hbm(one.shapes)
    if one.operation == "dynamic-update-slice":
        update = inside.get(one.operands[1]) if len(one.operands) > 1 else None
        return 2 * _hbm(one.shapes if update is None else update.shapes)
    return _plain_bytes(module, one)


def _plain_bytes(module: Module, one: Instruction) -> float:
    inside = module.computations[one.computation]
    return _hbm(one.shapes) + sum(_hbm(inside[name].shapes) for name in one.operands if name in inside)


def _fusion_bytes(module: Module, one: Instruction) -> float:
    outer, inner = module.computations[one.computation], module.computations.get(one.called_as("calls"), {})
    root = next((other for other in inner.values() if other.is_root), None)
    results = [root] if root is None or root.operation != "tuple" else [inner.get(name) for name in root.operands]
    total, updated = 0.0, set()
    for result, shape in zip(results, one.shapes, strict=False):
        made = _behind_bitcasts(inner, result)
        if made is not None and made.operation == "dynamic-update-slice":
            update, target = inner.get(made.operands[1]), _behind_bitcasts(inner, inner.get(made.operands[0]))
            if shape.in_hbm and update is not None:
                total += sum(_padded(other, shape) for other in update.shapes)
            if target is not None and target.operation == "parameter":
                updated.add(target.name)
        else:
            total += shape.hbm_bytes
    for other in inner.values():
        if other.operation != "parameter" or other.name in updated:
            continue
        number = int(re.match(r"(\d+)", other.rest).group(1))
        given = outer.get(one.operands[number]) if number < len(one.operands) else None
        shapes = other.shapes if given is None or given.operation == "tuple" else given.shapes
        if shapes and shapes[0].in_hbm:
            total += _read(module, inner, other, shapes)
    return total


def _padded(array: Shape, like: Shape) -> float:
    """Bytes of an array inside a fusion, whose layout has no memory space, in main memory."""
    return (
        dataclasses.replace(array, layout=array.layout if "T(" in array.layout else like.layout).hbm_bytes
        or array.bytes
    )


def _behind_bitcasts(inner: Mapping[str, Instruction], one: Instruction | None) -> Instruction | None:
    while one is not None and one.operation in ("bitcast", "copy") and one.operands and one.operands[0] in inner:
        one = inner[one.operands[0]]
    return one


def _read(
    module: Module, inner: Mapping[str, Instruction], one: Instruction, shapes: tuple[Shape, ...], depth: int = 0
) -> float:
    """Bytes that a fusion reads of one parameter: slices as slices, through nested fusions and bitcasts."""
    full, total = _hbm(shapes), 0.0
    for user in inner.values():
        if one.name not in user.operands:
            continue
        if user.operation == "bitcast" and depth < 6:
            total += _read(module, inner, user, shapes, depth + 1)
        elif user.operation in ("dynamic-slice", "slice"):
            total += _hbm(user.shapes)
        elif user.operation == "dynamic-update-slice" and user.operands[0] == one.name:
            continue
        elif user.operation == "fusion" and depth < 6:
            nested = module.computations.get(user.called_as("calls"), {})
            for number, name in enumerate(user.operands):
                parameter = _parameter(nested, number) if name == one.name else None
                if parameter is not None:
                    total += _read(module, nested, parameter, shapes, depth + 1)
        else:
            return full
        if total >= full:
            return full
    return total


def _parameter(inner: Mapping[str, Instruction], number: int) -> Instruction | None:
    wanted = f"{number})"
    return next((one for one in inner.values() if one.operation == "parameter" and one.rest.startswith(wanted)), None)


def _hbm(shapes: tuple[Shape, ...]) -> float:
    return sum(shape.hbm_bytes for shape in shapes)


def by_block(found: list[Operation]) -> Iterator[list[Operation]]:
    """The operations of each straight run, in order."""
    blocks: dict[int, list[Operation]] = defaultdict(list)
    for one in found:
        blocks[one.block].append(one)
    yield from blocks.values()
