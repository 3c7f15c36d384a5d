"""Which fields of a case's config.json a runner takes: a field that it does not know is an error that names it."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

# Fields that say how a case was made or how exact it is, wherever they stand.
REMARK = re.compile(
    r"(^|_)(about|check|checked|checks|comment|commit|date|description|float64|margins?|notes?|reasons?|reference|remarks?"
    r"|seeds?|versions?)(_|$)"
)


def check_fields(
    values: Mapping[str, Any],
    where: str,
    *,
    read: Iterable[str] = (),
    about: Iterable[str] = (),
    fixed: Mapping[str, Any] | None = None,
) -> None:
    """Refuse what a runner would silently leave out.

    Args:
      values: one object of config.json.
      where: its name, for the error.
      read: fields that the runner reads.
      about: fields that change no number that is compared.
      fixed: fields with the only value for which the comparison is right.

    Raises:
      ValueError: a field that is in none of these, or has another value.
    """
    fixed = fixed or {}
    for name, value in values.items():
        if name in fixed:
            if value != fixed[name]:
                raise ValueError(f"{where}.{name} = {value!r}: only {fixed[name]!r} is supported.")
        elif name not in read and name not in about and not REMARK.search(name):
            raise ValueError(
                f"{where}.{name} = {value!r}: the runner does not know this field and may compare wrongly."
            )


def tensors(io: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The tensors whose names begin with a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): io[name] for name in io if name.startswith(prefix)}
