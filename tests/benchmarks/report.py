"""What a benchmark found: rows for a table on the terminal, and the same as JSON."""

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclasses.dataclass
class Result:
    """One benchmark.

    Attributes:
      title: what was compared.
      settings: sizes and options, by name.
      rows: of the table.
      shown: columns of the table, in order; all keys of the first row if empty.
      samples: raw seconds, by case and side.
      notes: what a reader has to know to read the rows.
      load_average: of the machine, before and after; filled in by the command.
    """

    title: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    shown: tuple[str, ...] = ()
    samples: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    load_average: tuple[float, float] = (0.0, 0.0)

    def as_json(self) -> dict[str, Any]:
        """All of it, for a file."""
        return dataclasses.asdict(self)


class Printer:
    """Writes a report to standard output."""

    def __init__(self) -> None:
        self.console = Console(soft_wrap=True, highlight=False)
        if not self.console.is_terminal:
            self.console.width = 160

    def header(self, document: dict[str, Any]) -> None:
        """Command, machine, versions."""
        machine = document["machine"]
        load = ", ".join(f"{value:.1f}" for value in machine["load_average"])
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        self._say(f"$ {document['command']}")
        self._say(
            f"{machine['processor']}, {machine['instructions']}: {machine['cores_used']} of {machine['cores']} cores "
            f"for each side; load average {load}, niceness {machine['niceness']}; {machine['time']}"
        )
        self._say(f"Python {machine['python']}; {versions}")
        if document["quick"]:
            self._say("--quick: tiny sizes, few repeats. These numbers show that the code runs; they measure nothing.")

    def result(self, name: str, result: Result) -> None:
        """One table with its settings and notes."""
        self._say("")
        table = Table(title=f"{name}: {result.title}", title_justify="left")
        columns = result.shown or tuple(result.rows[0])
        for column in columns:
            justify = "left" if isinstance(result.rows[0].get(column), str) else "right"
            table.add_column(column.replace("_", " "), justify=justify)
        for row in result.rows:
            table.add_row(*(_show(row.get(column)) for column in columns))
        self.console.print(table)
        for case, values in result.settings.items():
            self._say(f"  {case}: {values}")
        for note in result.notes:
            self._say(f"  {note}")
        self._say(f"  load average {result.load_average[0]:.1f} before, {result.load_average[1]:.1f} after")

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False)


def _show(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
