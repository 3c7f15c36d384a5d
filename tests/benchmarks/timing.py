"""Timing two or more ways to do the same work, in turns, on a machine that may be busy with other things."""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks import machine


@dataclasses.dataclass
class Samples:
    """Seconds of each repeat: by the clock, and of processor time over all threads of this process and its children."""

    wall: list[float] = dataclasses.field(default_factory=list)
    processor: list[float] = dataclasses.field(default_factory=list)

    @property
    def median(self) -> float:
        """By the clock."""
        return statistics.median(self.wall)

    @property
    def least(self) -> float:
        """By the clock: what it takes when nothing else wants the cores."""
        return min(self.wall)


def in_turns(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, Samples]:
    """Run every side `repeats` times, one after the other within a round, in opposite order every other round.

    The sides return when their work is done. What slows the machine for a while slows all of them alike.
    """
    samples = {name: Samples() for name in sides}
    for repeat in range(repeats):
        for name in sides if repeat % 2 == 0 else reversed(sides):
            processor, wall = processor_seconds(), time.perf_counter()
            sides[name]()
            samples[name].wall.append(time.perf_counter() - wall)
            samples[name].processor.append(processor_seconds() - processor)
    return samples


def processor_seconds() -> float:
    """Processor time so far of this process and of the children that are alive (worker processes)."""
    seconds = time.process_time()
    for child in machine.children():
        try:
            # After the name, which is in brackets: user and system time are fields 14 and 15.
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        except FileNotFoundError:
            continue
        seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


def ratio(ours: Samples, theirs: Samples) -> dict[str, float | str]:
    """Our time over theirs (below 1: we are faster): of medians, of minima, of processor time, and round by round.

    `quartile_low` and `quartile_high` (together `middle_half`) enclose the middle half of the rounds' ratios.
    """
    rounds = sorted(a / b for a, b in zip(ours.wall, theirs.wall, strict=True))
    low, _, high = statistics.quantiles(rounds, n=4, method="inclusive") if len(rounds) > 1 else rounds * 3
    return {
        "ratio_of_medians": ours.median / theirs.median,
        "ratio_of_minima": ours.least / theirs.least,
        "ratio_of_processor_time": statistics.median(ours.processor) / max(statistics.median(theirs.processor), 1e-9),
        "median_ratio_of_rounds": statistics.median(rounds),
        "quartile_low": low,
        "quartile_high": high,
        "middle_half": f"{low:.2f}-{high:.2f}",
    }
