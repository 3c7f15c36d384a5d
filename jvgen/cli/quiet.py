"""Messages of libraries that would hide jvgen's own: known ones are dropped, the rest is shown."""

import logging

# Orbax warns about options that jvgen sets on purpose.
KNOWN = ()


class _Known(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(part in message for part in KNOWN)


def quiet_libraries() -> None:
    """Drop the known messages of absl's logger, which Orbax uses; everything below warnings is dropped too."""
    logger = logging.getLogger("absl")
    logger.setLevel(logging.WARNING)
    if not any(isinstance(known, _Known) for known in logger.filters):
        logger.addFilter(_Known())
