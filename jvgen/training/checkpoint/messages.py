"""Messages of Orbax that repeat what jvgen says or does on purpose: dropped; the rest of its logger is shown."""

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

# A failed save is raised as well, and jvgen reports it in one line; Orbax logs it four times with hundreds of lines.
REPEATED = (
    "_SignalingThread.run() raised an exception",
    "Handler Commit operations or the Commit callback in background save thread",
    "Save Finalize thread",
    "exception was never retrieved",
    "exception calling callback",
    # A corrupt checkpoint, with the content of the file.
    "Failed to json parse Metadata file",
    # Options that jvgen sets on purpose.
    "CheckpointManagerOptions.read_only=True",
    "Given directory is read only",
)


class _Repeated(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(part in message for part in REPEATED)


def drop_repeated() -> None:
    """Drop the messages of failed saves from the loggers of Orbax and asyncio."""
    for name in ("absl", "asyncio", "concurrent.futures"):
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Repeated) for known in logger.filters):
            logger.addFilter(_Repeated())


def drop_late_reads() -> None:
    """Drop the tracebacks of reads that end after Orbax has given up a corrupt checkpoint: dozens, all alike."""
    if not isinstance(sys.unraisablehook, functools.partial) or sys.unraisablehook.func is not _unless_late_read:
        sys.unraisablehook = functools.partial(_unless_late_read, sys.unraisablehook)


def _unless_late_read(show: Callable[[Any], None], unraisable: Any) -> None:
    if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"):
        show(unraisable)
