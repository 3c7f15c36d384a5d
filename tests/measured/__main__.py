"""python -m tests.measured: lists rows of docs/measured.md that lack their command or date, and runs cheap ones again.

Cheap are timings that take seconds, and rows whose command is `pytest FILE`. Ends with 1 if something has changed.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Callable

from tests.measured.page import PAGE, Row, rows
from tests.measured.plan_of_a_step import milliseconds

# What the row begins with -> the number now, and the pattern of the number in its result. Machines differ: a timing
# has changed if it is more than 1.5 times as long or as short.
TIMINGS: dict[str, tuple[Callable[[], float], str]] = {"plan of a step": (milliseconds, r"([\d.]+) ms")}
CHANGED = 1.5


def main() -> int:
    """Prints a line per row that was looked at; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.measured", description=__doc__)
    parser.add_argument("--list", action="store_true", help="only list what rows lack; run nothing")
    parser.add_argument("--only", default="", help="only rows in whose first cell these words are")
    given = parser.parse_args()
    changed = 0
    for row in rows(PAGE.read_text()):
        if row.lacks:
            print(f"measured.md:{row.line}: {row.what}: lacks {' and '.join(row.lacks)}")
        if not given.list and given.only in row.what:
            changed += _changed(row)
    print("nothing has changed" if not changed else f"{changed} rows have changed")
    return int(changed > 0)


def _changed(row: Row) -> bool:
    timing = next((TIMINGS[name] for name in TIMINGS if row.what.startswith(name)), None)
    if timing is not None:
        measure, pattern = timing
        found = re.search(pattern, row.result)
        assert found, f"measured.md:{row.line}: no number like {pattern} in its result"
        now, before = measure(), float(found[1])
        differs = not 1 / CHANGED <= now / before <= CHANGED
        print(f"{'CHANGED' if differs else 'as before'}: {row.what}: {now:.3g} now, {before:.3g} on the page")
        return differs
    if row.tests:
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", *row.tests], capture_output=True, text=True)
        last = done.stdout.strip().splitlines()[-1:]
        print(f"{'CHANGED' if done.returncode else 'as before'}: {row.what}: {''.join(last)}")
        return done.returncode != 0
    return False


if __name__ == "__main__":
    sys.exit(main())
