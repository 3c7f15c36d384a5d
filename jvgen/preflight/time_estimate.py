"""How long a compiled TPU step takes, by part: from operations, bundles of kernels and the chip's published rates.

Nothing is fitted to a measured time. What bounds each part:

* kernels: cycles that libtpu's final bundles take (`kernel_cycles`), at the chip's clock;
* matrix products: FLOPs at 95% of the peak at best, XLA's estimated cycles at worst, halfway in between;
* copies and elementwise operations: bytes of main memory at 85% of the data sheet's bandwidth, at worst at half of it.
  XLA's estimated cycles are 2.5 to 5.8 times the time of these bytes (sum, GELU, transpose, sum of rows on v5p and
  v6e), so they are divided by these, for operations in VMEM;
* collectives: bytes over links of the torus, as many at the same time as the rings of the compiler's algorithm use (it
  writes that for sums, whose rings run along all axes of a torus that they span), else as one ring; at best along all
  axes that the group spans, at worst along an open line; a microsecond a hop. What is hidden behind other operations
  does not count.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jvgen.parallel.chips import Chip
from jvgen.parallel.pods import wraps
from jvgen.preflight import program_cost
from jvgen.preflight.kernel_cycles import Kernel
from jvgen.preflight.program_cost import Kind, Operation, Phase, Sent

# Shares of the published rates that are reached at best.
PEAK_SHARE, BANDWIDTH_SHARE, SLOW_BANDWIDTH_SHARE = 0.95, 0.85, 0.5
# XLA's estimate of operations that memory bounds, against the time of their bytes: between these.
CYCLES_OVER_BYTES = (2.5, 5.8)
HOP = 1e-6  # seconds until a message is at the neighbor
# Bytes/s of one chip over the data center's network: 200 Gbit/s for a host of four.
NETWORK = 6.25e9
# A fusion with a product in it is one of elementwise operations if the product takes less than this share of it.
_SMALL_PRODUCT = 0.2
ASSUMED = (
    f"copies and elementwise operations at {BANDWIDTH_SHARE:.0%} of the memory's bandwidth (at least "
    f"{SLOW_BANDWIDTH_SHARE:.0%}), products between {PEAK_SHARE:.0%} of the peak and XLA's estimate, kernels by their "
    "bundles, collectives over as many links as the compiler's rings use, else two"
)
UNKNOWN = (
    "waiting for memory inside kernels, gaps between operations, contention of links, clock under load, input and "
    "host; ratios of two estimates say more than either"
)


@dataclasses.dataclass(frozen=True)
class Seconds:
    """A time in seconds: at least, likely, at most."""

    least: float = 0.0
    likely: float = 0.0
    most: float = 0.0

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.least + other.least, self.likely + other.likely, self.most + other.most)

    def __mul__(self, factor: float) -> "Seconds":
        return Seconds(self.least * factor, self.likely * factor, self.most * factor)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind over the same axes of the mesh, per device and step.

    Attributes:
      kind: "all-gather" ...
      axes: axes of the mesh whose devices exchange data, such as "fsdp" or "fsdp x seq"; "?" if not known.
      network: whether it leaves the slice.
      frozen: whether it belongs to frozen networks.
      count: operations.
      bytes: of whole arrays.
      seconds: on the links, hidden or not.
      hidden: of the likely time, seconds beside other operations.
    """

    kind: str
    axes: str
    network: bool
    frozen: bool
    count: int
    bytes: float
    seconds: Seconds
    hidden: float

    @property
    def rate(self) -> float:
        """Bytes/s of whole arrays."""
        return self.bytes / self.seconds.likely if self.seconds.likely else 0.0


# What the names of a step's parts begin with.
KERNEL = "kernel "
PRODUCTS, COPIES, ELEMENTWISE = LAYERS = ("matrix products", "layout copies", "elementwise and norms")


@dataclasses.dataclass(frozen=True)
class TimeEstimate:
    """Where the time of a step goes.

    Attributes:
      parts: seconds by part, exposed collectives included.
      traffic: collectives, the longest first.
      cycles: cycles of a call by kernel.
      without_cycles: kernels whose cycles are not known; their time is missing in `parts`.
      useful_flops: of trained networks per device and step, without padding and recomputation.
      frozen_flops: of frozen networks per device and step.
      program_flops: of the matrix products that XLA sees: all but kernels'.
      chip: kind of chip.
      attention_flops: of `useful_flops`, those of scores and weighted sums; 0 if the task does not say.
      has_code: whether the program has machine code; without it all times are at least what they say.
    """

    parts: dict[str, Seconds]
    traffic: tuple[Traffic, ...]
    cycles: dict[str, int]
    without_cycles: tuple[str, ...]
    useful_flops: float
    frozen_flops: float
    program_flops: float
    chip: Chip
    attention_flops: float = 0.0
    has_code: bool = True

    @property
    def is_whole(self) -> bool:
        """Whether no part of the time is missing."""
        return self.has_code and not self.without_cycles

    @property
    def seconds(self) -> Seconds:
        """Of a step."""
        return sum(self.parts.values(), Seconds())

    @property
    def attention_cost(self) -> float | None:
        """Time of a FLOP of attention in those of the layers' other FLOPs (`data.attention_cost`).

        Collectives and the optimizer, which do not grow with the clips or take little, are in neither. None where
        kernels do not compute the attention, or their time is not known.
        """
        others = self.useful_flops - self.attention_flops
        seconds = {
            is_kernel: sum(time.likely for name, time in self.parts.items() if name.startswith(names))
            for is_kernel, names in ((True, KERNEL), (False, LAYERS))
        }
        if not self.is_whole or not (self.attention_flops and others and all(seconds.values())):
            return None
        return seconds[True] / self.attention_flops * others / seconds[False]

    @property
    def utilization(self) -> tuple[float, float, float]:
        """Model FLOPs utilization at the longest, the likely and the shortest time: of a device, and of a chip."""
        times = self.seconds
        peak = self.chip.device_peak_flops
        return tuple(
            self.useful_flops / (time * peak) if time else 0.0 for time in (times.most, times.likely, times.least)
        )


def estimate(
    operations: Sequence[Operation],
    kernels: Mapping[str, Kernel],
    chip: Chip,
    mesh: Mesh,
    *,
    useful_flops: float,
    frozen_flops: float = 0.0,
    attention_flops: float = 0.0,
    has_code: bool = True,
) -> TimeEstimate:
    """The time of one step on the devices of a mesh.

    Args:
      operations: of the compiled program, `program_cost.operations`.
      kernels: of the same program, `kernel_cycles.read`.
      chip: of the mesh's devices.
      mesh: that the program was compiled for.
      useful_flops, frozen_flops, attention_flops: of trained and of frozen networks, and of the trained ones'
        attention, per step and device.
      has_code: whether the program has machine code, and with it XLA's estimates of cycles.
    """
    parts: dict[str, Seconds] = defaultdict(Seconds)
    traffic: dict[tuple, Traffic] = {}
    links = Links(chip, mesh)
    missing: list[str] = []
    for block in program_cost.by_block(operations):
        times = [_seconds(one, kernels, chip, links) for one in block]
        hidden = _hidden(block, [time.likely for time in times])
        for one, time, beside in zip(block, times, hidden, strict=True):
            if one.kind is Kind.KERNEL and one.name not in kernels:
                missing.append(one.name)
            if one.sent is not None:
                _add(traffic, one, time, beside, links)
                # Without machine code it is not known how long what runs beside it takes.
                beside = beside if has_code or not one.is_start else time.likely
                share = 1 - beside / time.likely if time.likely else 1.0
                parts[_part(one, chip)] += time * one.times * share
            elif one.kind is Kind.TRANSFER:
                # Prefetches run beside other operations: at worst they take the memory's bandwidth from them.
                parts[Kind.TRANSFER.value] += Seconds(0.0, 0.0, time.most * one.times)
            else:
                parts[_part(one, chip)] += time * one.times
    program_flops = sum(one.times * one.flops for one in operations)
    called = {one.name for one in operations if one.kind is Kind.KERNEL}
    return TimeEstimate(
        parts=dict(sorted(parts.items(), key=lambda item: -item[1].likely)),
        traffic=tuple(sorted(traffic.values(), key=lambda one: -one.seconds.likely)),
        cycles={name: kernel.cycles(chip.cores) for name, kernel in kernels.items() if name in called},
        without_cycles=tuple(missing),
        useful_flops=useful_flops,
        frozen_flops=frozen_flops,
        program_flops=program_flops,
        chip=chip,
        attention_flops=attention_flops,
        has_code=has_code,
    )


def _seconds(one: Operation, kernels: Mapping[str, Kernel], chip: Chip, links: "Links") -> Seconds:
    """Of one execution, as if nothing ran beside it."""
    bandwidth = chip.device_bandwidth
    memory, slow = one.bytes / bandwidth / BANDWIDTH_SHARE, one.bytes / bandwidth / SLOW_BANDWIDTH_SHARE
    if one.sent is not None:
        return links.seconds(one.sent)
    if one.kind is Kind.KERNEL:
        kernel = kernels.get(one.name)
        if kernel is None or not chip.clock:
            return Seconds()
        time = max(memory, kernel.cycles(chip.cores) / chip.clock)
        return Seconds(time, time, max(slow, time))
    estimated = (one.cycles or 0) / chip.clock if chip.clock else 0.0
    if _is_product(one, chip):
        least = max(memory, _product_seconds(one, chip))
        most = max(least, estimated)
        return Seconds(least, (least + most) / 2, most)
    if one.start:
        return Seconds()
    high, low = CYCLES_OVER_BYTES
    return Seconds(memory, max(memory, estimated / low), max(slow, estimated / high))


def _product_seconds(one: Operation, chip: Chip) -> float:
    as_bfloat16 = one.flops - one.int8_flops * (1 - 1 / chip.int8)
    return as_bfloat16 / chip.device_peak_flops / PEAK_SHARE


def _is_product(one: Operation, chip: Chip) -> bool:
    memory = one.bytes / chip.device_bandwidth / BANDWIDTH_SHARE
    return one.kind is Kind.PRODUCT and _product_seconds(one, chip) > _SMALL_PRODUCT * memory


def _part(one: Operation, chip: Chip) -> str:
    frozen = one.phase is Phase.FROZEN
    if one.sent is not None:
        return f"collectives{', frozen networks' if frozen else ''}"
    if frozen:
        return Phase.FROZEN.value
    if one.kind is Kind.KERNEL:
        name = one.name.rstrip("0123456789").rstrip(".")
        return f"{KERNEL}{name}{', remat' if one.phase is Phase.REMAT else ''}"
    if one.phase is Phase.UPDATE:
        return "optimizer, EMA and the rest"
    if _is_product(one, chip):
        return f"{PRODUCTS}, {one.phase.value}"
    return f"{COPIES if one.kind is Kind.COPY else ELEMENTWISE}, {one.phase.value}"


def _hidden(block: Sequence[Operation], times: Sequence[float]) -> list[float]:
    """Of each asynchronous collective, the seconds beside other operations before its end; each second hides once."""
    hidden, spare = [0.0] * len(block), list(times)
    ends = {one.start: number for number, one in enumerate(block) if one.start}
    for number, one in enumerate(block):
        if one.sent is None or not one.is_start:
            continue
        need = times[number]
        for other in range(number + 1, ends.get(one.name, number)):
            if block[other].sent is None and block[other].kind is not Kind.TRANSFER:
                taken = min(need - hidden[number], spare[other])
                spare[other] -= taken
                hidden[number] += taken
    return hidden


def _add(traffic: dict[tuple, Traffic], one: Operation, time: Seconds, beside: float, links: "Links") -> None:
    axes, network = links.axes(one.sent.group), links.leaves_slice(one.sent.group)
    key = (one.sent.kind, axes, network, one.phase is Phase.FROZEN)
    before = traffic.get(key, Traffic(*key, 0, 0.0, Seconds(), 0.0))
    traffic[key] = dataclasses.replace(
        before,
        count=before.count + one.times,
        bytes=before.bytes + one.times * one.sent.bytes,
        seconds=before.seconds + time * one.times,
        hidden=before.hidden + beside * one.times,
    )


class Links:
    """How fast groups of a mesh's devices reach each other.

    Attributes:
      chip: of the devices.
      mesh: the devices in the order of the program.
    """

    def __init__(self, chip: Chip, mesh: Mesh):
        self.chip, self.mesh = chip, mesh
        self._devices: list[Any] = list(mesh.devices.flat)
        places = [_place(device) for device in self._devices]
        self._extent = tuple(max(sizes) + 1 for sizes in zip(*places, strict=True))
        self._places = places

    def axes(self, group: Sequence[int]) -> str:
        """Axes of the mesh along which the devices of a group differ: "fsdp x seq"."""
        if not group:
            return "?"
        names, sizes = list(self.mesh.shape), tuple(self.mesh.shape.values())
        places = np.unravel_index(np.asarray(group), sizes)
        return " x ".join(name for name, at in zip(names, places, strict=True) if len(set(at.tolist())) > 1) or "?"

    def leaves_slice(self, group: Sequence[int]) -> bool:
        """Whether a group has devices of several slices."""
        return len({getattr(self._devices[number], "slice_index", 0) for number in group}) > 1

    def seconds(self, sent: Sent) -> Seconds:
        """Of one collective. A ring has two links a device, a pair and a line without a closing link have one."""
        count = max(sent.size, len(sent.group))
        if count < 2 or not self.chip.link:
            return Seconds()
        if self.leaves_slice(sent.group):
            time = _wire_bytes(sent, count, count) * self.chip.devices / NETWORK
            return Seconds(time, time, time)
        rates, longest = self._rates(sent.group)
        if not rates:
            # Cores of one chip, or a group that is not known: a pair's link.
            rates, longest = [self.chip.link], count
        wire = _wire_bytes(sent, count, longest)
        if sent.kind == "collective-permute":
            return Seconds(*[wire / self.chip.link + HOP] * 3)
        # A ring through a block of two axes or more needs no closing links.
        one_ring = 2 * self.chip.link if len(rates) > 1 else rates[0]
        # Pairs and open lines have fewer links than one ring of the algorithm takes where it can.
        chosen = max(one_ring, sent.links * self.chip.link) if sent.links > 2 else one_ring
        return Seconds(
            wire / max(sum(rates), chosen), wire / chosen + HOP * count / 2, wire / self.chip.link + HOP * count
        )

    def _rates(self, group: Sequence[int]) -> tuple[list[float], int]:
        """Bytes/s along every axis of the torus that a group spans, and its extent along the longest."""
        rates, longest = [], 1
        for axis, places in enumerate(zip(*(self._places[number] for number in group), strict=True)):
            extent, size = len(set(places)), self._extent[axis]
            if extent > 1:
                ring = extent == size and extent > 2 and wraps(self.chip.name, self._extent, axis)
                rates.append(self.chip.link * (2 if ring else 1))
                longest = max(longest, extent)
        return rates, longest


def _place(device: jax.Device) -> tuple[int, ...]:
    return tuple(getattr(device, "coords", None) or (device.id,))


def _wire_bytes(sent: Sent, count: int, longest: int) -> float:
    """Bytes that pass the links of a device."""
    if sent.kind == "collective-permute":
        return sent.bytes
    if sent.kind.endswith("all-to-all"):
        # Each device keeps its share; on a ring a message goes a quarter of the way around on average.
        return sent.bytes * longest / 4
    return sent.bytes * (count - 1) / count * (2 if sent.kind == "all-reduce" else 1)
