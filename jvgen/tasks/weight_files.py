"""The files of weights that a task's config names."""

import dataclasses
from collections.abc import Iterator
from typing import Any


def named_files(node: Any, path: str = "task", endings: tuple[str, ...] = ("weights",)) -> Iterator[tuple[str, str]]:
    """Dotted field and value of every string of a config whose field has one of these endings, in field order.

    Args:
      node: config of a task, or of a part of it at `path`.
      path: dotted path of the node.
      endings: of the names of fields.
    """
    for field in dataclasses.fields(node):
        value, name = getattr(node, field.name), f"{path}.{field.name}"
        if dataclasses.is_dataclass(value):
            yield from named_files(value, name, endings)
        elif field.name.endswith(endings) and isinstance(value, str) and value:
            yield name, value
