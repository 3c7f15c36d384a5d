"""The log file of one process: all its messages and the warnings of libraries, each line with its time."""

import contextlib
import logging
import threading
import time
import warnings
from types import TracebackType
from typing import Any, Self

from rich.console import Console

from jvgen import storage
from jvgen.parallel import failing, processes

FOLDER = "logs"
# Width of tables in the file, in characters.
TABLE_WIDTH = 160
# Characters of earlier starts that a file in a bucket, which is written anew, keeps.
KEPT = 1_000_000


class ProcessLog(logging.Handler):
    """Context that appends to `logs/process_N.log` of the run directory: messages, Python warnings, log records.

    Records of other libraries' loggers count from level WARNING on. They and Python warnings still go to where they
    went before.

    Args:
      workdir: run directory.
      process_index: N; that of this process by default.
    """

    def __init__(self, workdir: storage.Path, process_index: int | None = None):
        super().__init__(logging.WARNING)
        number = processes.index() if process_index is None else process_index
        self._mirror = storage.Mirror(workdir / FOLDER / f"process_{number}.log", log=lambda message: None)
        self._mirror.local.parent.mkdir(parents=True, exist_ok=True)
        if self._mirror.local != self._mirror.path:
            self._mirror.local.write_text(_last(self._mirror.path), encoding="utf-8")
        self._file = self._mirror.local.open("a", encoding="utf-8")
        self._leaving = contextlib.ExitStack()
        self._write_lock = threading.Lock()
        self._tables = Console(file=self._file, width=TABLE_WIDTH, color_system=None, force_terminal=False)
        self.write(f"process {number} of {processes.count()} starts")

    def write(self, message: Any) -> None:
        """Append a message: text, every line with the time, or a rich table."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S") + f".{time.time() % 1 * 1000:03.0f}"
        # A full disk ends the run where something would be lost, with that message.
        with self._write_lock, contextlib.suppress(OSError):
            if self._file.closed:
                return
            if isinstance(message, str):
                self._file.writelines(f"{stamp} {line}\n" for line in message.splitlines() or [""])
            else:
                self._file.write(f"{stamp}\n")
                self._tables.print(message)
            self._file.flush()

    def emit(self, record: logging.LogRecord) -> None:
        """A record of a library's logger."""
        try:
            self.write(f"{record.levelname} {record.name}: {record.getMessage()}")
        except Exception:
            self.handleError(record)

    def __enter__(self) -> Self:
        logging.getLogger().addHandler(self)
        self._leaving.enter_context(failing.before_exit(self._mirror.sync))
        self._showwarning = warnings.showwarning
        warnings.showwarning = self._show_warning
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.write(f"ends with {type(error).__name__}: {error}")
        warnings.showwarning = self._showwarning
        self._leaving.close()
        logging.getLogger().removeHandler(self)
        with self._write_lock, contextlib.suppress(OSError):
            self._file.close()
        self._mirror.close()

    def _show_warning(self, message: Any, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
        self.write(f"WARNING {filename}:{lineno}: {category.__name__}: {message}")
        self._showwarning(message, category, filename, lineno, *rest)


def _last(file: storage.Path) -> str:
    """The end of the log of earlier starts; none if it cannot be read, which is no reason not to train."""
    try:
        return storage.read_text(file)[-KEPT:] if file.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        return f"the log of earlier starts could not be read: {error}\n"
