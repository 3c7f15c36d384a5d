"""Progress of long work: a bar on a terminal, a plain line per 10% in a log."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
# Called with the number of items done and in total.
Report = Callable[[int, int], None]


@contextlib.contextmanager
def progress_bar(title: str, unit: str = "items") -> Iterator[Report]:
    """Yields a function `(done, total)` that updates the display."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain_lines(title, unit)
        return
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def progress(items: Iterable[T], title: str, unit: str = "items", total: int | None = None) -> Iterator[T]:
    """Iterate with progress; `total` is needed for its percentage if `items` has no length."""
    count = len(items) if total is None and hasattr(items, "__len__") else total
    with progress_bar(title, unit) as report:
        for done, item in enumerate(items):
            yield item
            report(done + 1, count if count is not None else done + 1)


def _plain_lines(title: str, unit: str) -> Report:
    start = time.perf_counter()
    printed = 0

    def report(done: int, total: int) -> None:
        nonlocal printed
        tenth = 10 * done // total if total else 0
        if tenth > printed:
            printed = tenth
            print(f"{title}: {done}/{total} {unit}, {time.perf_counter() - start:.1f} s", flush=True)

    return report
