"""Annotations of config fields: their alternatives, whether a value fits, and how to name both in a message."""

import enum
import functools
import types
import typing
from typing import Any


@functools.cache
def field_hints(owner: Any) -> dict[str, Any]:
    """Resolved annotation of every field of a class or parameter of a function."""
    return typing.get_type_hints(owner)


def options(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union, None first (so that "none" is not read as a string), numbers before strings."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(sorted(typing.get_args(hint), key=lambda h: (h is not type(None), h is str)))
    return (hint,)


def item_hint(hint: Any, index: int) -> Any:
    """Annotation of one item of a tuple."""
    for option in options(hint):
        arguments = typing.get_args(option)
        if typing.get_origin(option) is tuple and arguments:
            if len(arguments) == 2 and arguments[1] is Ellipsis:
                return arguments[0]
            return arguments[index] if index < len(arguments) else Any
    return Any


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotation; an int is a float, a bool is neither."""
    return any(_fits_one(value, option) for option in options(hint))


def _fits_one(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is typing.Literal:
        return value in arguments
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if not (len(arguments) == 2 and arguments[1] is Ellipsis) and len(value) != len(arguments):
            return False
        return all(fits(item, item_hint(hint, index)) for index, item in enumerate(value))
    if origin is dict:
        return isinstance(value, dict) and all(fits(item, arguments[1]) for item in value.values())
    if origin is not None:
        return isinstance(value, origin)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def kind_of(value: Any) -> str:
    """What a value is, in words: "2 values", "str"."""
    return f"{len(value)} values" if isinstance(value, tuple) else type(value).__name__


def describe(hint: Any) -> str:
    """An annotation in words: "a tuple of int", "one of 'a', 'b'"."""
    choices = options(hint)
    if len(choices) > 1:
        return " or ".join(describe(choice) for choice in choices)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is type(None):
        return "none"
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(choice) for choice in arguments)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "one of " + ", ".join(repr(member.value) for member in hint)
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return f"a tuple of {describe(arguments[0])}"
        return f"{len(arguments)} values, {', '.join(describe(argument) for argument in arguments)}"
    return getattr(hint, "__name__", str(hint))
