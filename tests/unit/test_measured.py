"""Every number of docs/measured.md has its command, date and commit, and those that are cheap can be run again."""

import shlex
from pathlib import Path

from tests.measured import page
from tests.measured.__main__ import TIMINGS
from tests.measured.plan_of_a_step import milliseconds

ROOT = Path(__file__).parents[2]
ROWS = page.rows(page.PAGE.read_text())


def test_rows_say_how_and_when():
    assert len(ROWS) > 30
    lacking = [f"measured.md:{row.line}: {row.what}: {row.lacks}" for row in ROWS if row.lacks]
    assert not lacking


def test_what_is_lacking_is_named():
    text = f"## S\n\n{page.HEAD}\n|---|---|---|---|\n| a | 1 | `x \\| y` | 2026-11-29, 0123abc |\n| b | 2 | | today |\n"
    first, second = page.rows(text)
    assert (first.section, first.command, first.lacks) == ("S", r"`x \| y`", [])
    assert second.lacks == ["command", "date, commit"] and second.line == 6


def test_commands_that_name_tests_name_files_that_exist():
    for row in ROWS:
        for word in shlex.split(row.command.strip("`").replace("`", " ").replace("'", " ")):
            if word.startswith("tests/") and not word.endswith("..."):
                assert (ROOT / word.rstrip(",;")).exists(), f"measured.md:{row.line}: {word}"


def test_the_timings_are_of_rows_and_run():
    for name in TIMINGS:
        assert sum(row.what.startswith(name) for row in ROWS) == 1
    assert 0 < milliseconds(records=2000, repeats=2) < 1000
