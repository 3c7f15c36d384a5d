"""The rows of docs/measured.md: what was measured, the result, the command, date and commit."""

import dataclasses
import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "measured.md"
HEAD = "| what | result | command | date, commit |"
_STAMP = re.compile(r"20\d\d-\d\d-\d\d, [0-9a-f]{7}|the same")


@dataclasses.dataclass(frozen=True)
class Row:
    """One row: its section, its four cells, and its line in the page (from 1)."""

    section: str
    what: str
    result: str
    command: str
    stamp: str
    line: int

    @property
    def lacks(self) -> list[str]:
        """What the row does not say: the command, or date and commit."""
        return [
            name
            for name, there in (("command", self.command), ("date, commit", _STAMP.search(self.stamp)))
            if not there
        ]

    @property
    def tests(self) -> list[str]:
        """The files of a command that is `pytest FILES`; none for other commands."""
        found = re.fullmatch(r"`pytest ((?:tests/\S+\.py ?)+)`", self.command)
        return found[1].split() if found else []


def rows(text: str) -> list[Row]:
    """The rows of all tables with the head of this page; other tables have their command in the text above them."""
    found, section, inside = [], "", False
    for number, line in enumerate(text.splitlines(), 1):
        section = line[3:] if line.startswith("## ") else section
        if line == HEAD or not line.startswith("|"):
            inside = line == HEAD
        elif inside and not line.startswith("|---"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            found.append(Row(section, *cells, line=number))
    return found
