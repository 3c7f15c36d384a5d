"""What a build did: counts of records, rejected inputs by reason, notes and warnings."""

import collections
import dataclasses
import json
import re
import time
from collections.abc import Iterator, Sequence

from jvgen.data.builders.jobs import Rejected
from jvgen.data.builders.units import Done
from jvgen.storage import Path

REJECTED_LOG = "refused.jsonl"  # beside the data set
_SHOWN = 10  # rows of a table of reasons


@dataclasses.dataclass(frozen=True)
class Summary:
    """Result of a build.

    Attributes:
      out: folder of the data set, or of the part.
      counts: number of records by split and kind.
      rejected: inputs that were left out, and why.
      digests: index digest of each split; empty for a part.
      bytes: size on disk.
      seconds: wall time.
      jobs: number of inputs.
      notes: how often something was done that was not asked for, such as encoding a file again.
      warnings: what training may stumble over.
    """

    out: Path
    counts: dict[str, dict[str, int]]
    rejected: tuple[Rejected, ...]
    digests: dict[str, str]
    bytes: int
    seconds: float
    jobs: int = 0
    notes: dict[str, int] = dataclasses.field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def records(self) -> int:
        """Number of records in all splits."""
        return sum(sum(kinds.values()) for kinds in self.counts.values())

    def warned(self, *warnings: str) -> "Summary":
        """With more warnings; those that are "" are left out."""
        return dataclasses.replace(self, warnings=(*self.warnings, *filter(None, warnings)))

    def __str__(self) -> str:
        lines = [f"{self.out}: {self.records} records, {self.bytes / 1e6:.1f} MB, {self.seconds:.1f} s"]
        for split, kinds in self.counts.items():
            parts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
            digest = f" (digest {self.digests[split][:12]})" if split in self.digests else ""
            lines.append(f"  {split}: {parts}{digest}")
        lines += [f"  {note}: {count}" for note, count in sorted(self.notes.items())]
        lines += [f"  warning: {warning}" for warning in self.warnings]
        if self.rejected:
            lines.append(f"  rejected: {len(self.rejected)} of {self.jobs} (listed in {REJECTED_LOG})")
            lines += [f"  {row}" for row in _table(self.rejected)]
        return "\n".join(lines)


def summary_of(out: Path, done: Sequence[Done], digests: dict[str, str], size: int, began: float) -> Summary:
    """The summary of finished units.

    Args:
      out, digests: as in `Summary`.
      done: the units.
      size: bytes on disk.
      began: `time.perf_counter()` at the start.
    """
    counts: dict[str, collections.Counter] = {}
    widths, notes = collections.Counter(), collections.Counter()
    for unit in done:
        if unit.kinds:
            counts.setdefault(unit.split, collections.Counter()).update(unit.kinds)
        widths.update(unit.action_widths)
        notes.update(unit.notes)
    warnings = []
    if len(widths) > 1:
        listed = ", ".join(f"{width} in {count} records" for width, count in sorted(widths.items()))
        warnings.append(f"numbers per action: {listed}; such records cannot be in one batch (--action-width)")
    rewarded, records = sum(unit.rewarded for unit in done), sum(sum(unit.kinds.values()) for unit in done)
    if 0 < rewarded < records:
        warnings.append(
            f"rewards are in {rewarded} of {records} records; training that learns rewards refuses the others"
        )
    return Summary(
        out=out,
        counts={split: dict(kinds) for split, kinds in counts.items()},
        rejected=tuple(item for unit in done for item in unit.rejected),
        digests=digests,
        bytes=size,
        seconds=time.perf_counter() - began,
        jobs=sum(unit.jobs for unit in done),
        notes=dict(notes),
        warnings=tuple(warnings),
    )


def log_line(item: Rejected) -> str:
    """The line of a rejected input in `REJECTED_LOG`."""
    return json.dumps({"name": item.name, "reason": item.reason, "damaged": item.corrupt}) + "\n"


def _table(rejected: Sequence[Rejected]) -> Iterator[str]:
    """Reasons by how often they occur; those that differ in numbers and names alone are one."""
    groups: dict[str, list[Rejected]] = {}
    for item in rejected:
        kind = re.sub(r"\S*[/\d]\S*|'[^']*'", "_", item.reason.replace(item.name, "_"))
        groups.setdefault(kind, []).append(item)
    rows = sorted(groups.values(), key=len, reverse=True)
    yield "  count  reason"
    for items in rows[:_SHOWN]:
        examples = ", ".join(item.name for item in items[:3]) + (", ..." if len(items) > 3 else "")
        yield f"  {len(items):5d}  {items[0].reason[:160]}  [{examples}]"
    if len(rows) > _SHOWN:
        yield f"  {sum(map(len, rows[_SHOWN:])):5d}  for {len(rows) - _SHOWN} other reasons"
