"""Progress of long work: a bar on a terminal, a plain line per 10% in a log."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

T = TypeVar("T")
_LINE_EVERY = 60.0  # seconds, at most, in a log
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
        _Rate(),
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


class _Rate(ProgressColumn):
    """Items per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.3g}/s" if task.speed else "")


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _plain_lines(title: str, unit: str) -> Report:
    start = last = time.perf_counter()
    printed = 0
    before: int | None = None  # what was done when this began, where work goes on

    def report(done: int, total: int) -> None:
        nonlocal printed, before, last
        before = (done if done > 1 else 0) if before is None else before
        tenth = 10 * done // total if total else 0
        now = time.perf_counter()
        if tenth > printed or now - last > _LINE_EVERY:
            printed, last = tenth, now
            line = f"{title}: {done}/{total} {unit}, {now - start:.1f} s"
            rate = (done - before) / (now - start)
            if rate > 0 and done < total:
                line += f", {rate:.3g} {unit}/s, {_duration((total - done) / rate)} left"
            print(line, flush=True)

    return report
