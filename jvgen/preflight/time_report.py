"""An estimate of a step's time as text: the step, where its time goes, what is sent, what was assumed."""

from rich.console import Console
from rich.table import Table

from jvgen.parallel.pods import slice_of
from jvgen.preflight.time_estimate import ASSUMED, PEAK_SHARE, UNKNOWN, Seconds, TimeEstimate

GIB = 2**30


def print_estimate(console: Console, found: TimeEstimate, topology: str) -> None:
    """Print the estimate of one batch shape's step."""
    times, (least, likely, most) = found.seconds, found.utilization
    if found.has_code:
        more, less = ("more than ", "less than ") if found.without_cycles else ("", "")
        text = f"{more}{_range(times)} s per step, MFU {less}{likely:.1%} ({least:.1%} to {most:.1%})"
    else:
        text = f"at least {times.least:.3g} s per step, MFU at most {most:.1%}"
    console.print(f"estimate: {text}; not measured", markup=False)
    console.print(_units(found, topology), markup=False)
    if not found.has_code:
        kernels = f", kernels {', '.join(found.without_cycles)} not counted" if found.without_cycles else ""
        console.print(
            f"no machine code was generated: matrix products at {PEAK_SHARE:.0%} of the peak, asynchronous collectives "
            f"hidden{kernels}",
            markup=False,
        )
    elif found.without_cycles:
        console.print(
            f"not in it: kernels {', '.join(found.without_cycles)}, whose instructions libtpu has not written "
            "(`jvgen estimate` and `jvgen compile` ask for them before libtpu is loaded)",
            markup=False,
        )
    console.print(_parts_table(found))
    if found.attention_cost is not None:
        console.print(
            f"a FLOP of attention takes {found.attention_cost:.2f} times as long as one of the layers' others: "
            "data.attention_cost, where data.tokens_per_step chooses batch sizes",
            markup=False,
        )
    if found.traffic:
        console.print(_traffic_table(found))
    if found.has_code:
        console.print(f"assumed: {ASSUMED}", markup=False)
    console.print(f"not known: {UNKNOWN}", markup=False)


def _units(found: TimeEstimate, topology: str) -> str:
    chip, seconds = found.chip, found.seconds.likely
    device = found.useful_flops / seconds if seconds else 0.0
    cores = f"{chip.cores} TensorCores" if chip.cores > 1 else "one TensorCore"
    per = f"a device is a chip of {cores}" if chip.devices == 1 else f"a chip is {chip.devices} devices of {cores}"
    return (
        f"useful: {found.useful_flops / 1e12:.1f} TFLOP per device and step, {device / 1e12:.0f} TFLOP/s per device, "
        f"{device * chip.devices / 1e12:.0f} of {chip.peak_flops / 1e12:.0f} per chip; padding, recomputation and "
        f"frozen networks ({found.frozen_flops / 1e12:.1f} TFLOP) are not counted; {per}; {slice_of(topology)}"
    )


def _range(times: Seconds) -> str:
    return f"{times.likely:.3g} ({times.least:.3g} to {times.most:.3g})"


def _parts_table(found: TimeEstimate) -> Table:
    columns = ("ms/step", "share", "least", "most") if found.has_code else ("at least ms/step", "share")
    table = Table("part", *columns, title="where the time goes", title_justify="left")
    total, shown = found.seconds, _cells if found.has_code else _least
    for name, times in found.parts.items():
        if times.most >= 1e-4 * total.most:
            table.add_row(name, *shown(times, total))
    table.add_row("step", *shown(total, total))
    return table


def _least(times: Seconds, total: Seconds) -> tuple[str, ...]:
    return _milliseconds(times.least), f"{times.least / total.least:.1%}" if total.least else "0.0%"


def _cells(times: Seconds, total: Seconds) -> tuple[str, ...]:
    share = times.likely / total.likely if total.likely else 0.0
    return _milliseconds(times.likely), f"{share:.1%}", _milliseconds(times.least), _milliseconds(times.most)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}" if seconds >= 1e-3 or not seconds else f"{seconds * 1e3:.2g}"


def _traffic_table(found: TimeEstimate) -> Table:
    columns = ("collective", "over", "ops/step", "GiB/step", "GB/s", "ms/step", "hidden ms")
    table = Table(*columns, title="collectives per device, by mesh axis", title_justify="left")
    longest = found.traffic[0].seconds.likely
    for one in found.traffic:
        if one.seconds.likely < 0.005 * longest:
            continue
        where = one.axes + (" (between slices)" if one.network else "") + (", frozen networks" if one.frozen else "")
        milliseconds, rate = _milliseconds(one.seconds.likely), f"{one.rate / 1e9:.0f}"
        sizes = str(one.count), f"{one.bytes / GIB:.2f}", rate, milliseconds
        table.add_row(one.kind, where, *sizes, _milliseconds(one.hidden))
    return table
