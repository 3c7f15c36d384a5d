"""Configuration: frozen dataclasses, dotted overrides with did-you-mean, and text dumps.

A component owns the dataclass that it reads (`class OptimizerConfig(Config)` is defined beside the optimizer). A run
is described by a Python file with one function `experiment()` that returns the complete, nested description.
`jvgen.saved_config` writes configs as JSON and reads them back, also those of earlier versions.
"""

import ast
import contextlib
import dataclasses
import difflib
import enum
import functools
import importlib.util
import inspect
import sys
import traceback
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jvgen import exit_codes
from jvgen.field_types import describe, field_hints, fits, item_hint, kind_of, options
from jvgen.value_rules import declared, problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Base of every configuration dataclass.

    Subclasses are `@dataclasses.dataclass(frozen=True, kw_only=True)`. Annotations of fields declare rules of numbers
    and patterns (see `jvgen.value_rules`), which are checked before every `validate`. Subclasses may override that with
    what relates fields to each other; it raises `ValueError` with a message that names the field, the value, the rule
    and the fix.

    Attributes:
      renamed_fields: fields as earlier versions saved them -> their names now.
      dropped_fields: fields that earlier versions saved and that change nothing any more.
      moved_fields: fields of earlier versions -> dotted paths of what replaced them; `override` takes both.
    """

    renamed_fields: typing.ClassVar[dict[str, str]] = {}
    dropped_fields: typing.ClassVar[frozenset[str]] = frozenset()
    moved_fields: typing.ClassVar[dict[str, str]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "validate" in cls.__dict__:
            cls.validate = _after_rules(cls.validate)

    @classmethod
    def upgrade(cls, saved: dict[str, Any]) -> dict[str, Any]:
        """Convert the fields that an earlier version saved to those of this version.

        Args:
          saved: decoded JSON by field name, without `class`; nested configs are dicts with `class` and their fields.
        """
        kept = {name: value for name, value in saved.items() if name not in cls.dropped_fields}
        return {cls.renamed_fields.get(name, name): value for name, value in kept.items()}

    def validate(self) -> None:
        """Raise `ValueError` if a field breaks its rule, or the fields cannot work together.

        Called for every node by `validate_tree`, and by networks when they are built.
        """
        _check_rules(self)

    def replace(self, **changes: Any) -> typing.Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


class ConfigError(ValueError):
    """A user's mistake in a configuration: the message is meant to be read without a traceback."""

    exit_code = exit_codes.USER_ERROR


def _check_rules(config: Config) -> None:
    rules = declared(type(config))
    for field in dataclasses.fields(config):
        check_value(getattr(config, field.name), rules[field.name], field.name)


def _after_rules(validate: Callable[[Any], None]) -> Callable[[Any], None]:
    """`validate` of a subclass, after the rules of its fields."""

    @functools.wraps(validate)
    def checked(config: Config) -> None:
        _check_rules(config)
        validate(config)

    return checked


def check_value(value: Any, hint: Any, path: str) -> None:
    """Check all numbers and patterns in a value by what its annotation declares.

    Raises:
      ConfigError: names the path, the value, the rule and the fix.
    """
    for where, wrong, problem in problems(value, hint, path):
        raise ConfigError(f"{where} = {wrong!r}: {problem}")


def validate_tree(config: Any, path: str = "") -> None:
    """Check the type of every leaf, and what its annotation declares; then `validate` every node, innermost first.

    Raises:
      ConfigError: names the dotted path, the value, the rule and the fix.
    """
    if isinstance(config, (tuple, list)):
        for index, item in enumerate(config):
            validate_tree(item, f"{path}.{index}".lstrip("."))
        return
    if isinstance(config, dict):
        for key, item in config.items():
            validate_tree(item, f"{path}.{key}".lstrip("."))
        return
    if not dataclasses.is_dataclass(config):
        return
    hints, rules = field_hints(type(config)), declared(type(config))
    for field in dataclasses.fields(config):
        where = f"{path}.{field.name}".lstrip(".")
        value = getattr(config, field.name)
        if not fits(value, hints[field.name]):
            raise ConfigError(f"{where} = {value!r}: expected {describe(hints[field.name])}, got {kind_of(value)}.")
        check_value(value, rules[field.name], where)
        validate_tree(value, where)
    if isinstance(config, Config):
        try:
            config.validate()
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"{path or type(config).__name__}: {error}") from error


def override(config: Any, assignments: typing.Sequence[str]) -> Any:
    """Apply `a.b.c=value` assignments to a nested config and return the changed copy.

    Values are parsed by the annotation of the field they land on: `true`/`false`, numbers, `none` for optional fields,
    comma-separated items for tuples. Numeric path parts index into tuples, other parts name fields or dict keys.

    Raises:
      ConfigError: unknown path (with the nearest names), or a value that does not fit the field's type.
    """
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        if not separator:
            raise ConfigError(f"--set {assignment!r}: expected PATH=VALUE, for example optimizer.learning_rate=3e-4.")
        config = _assign(config, path.strip().split("."), text.strip(), path.strip(), None)
    return config


def _assign(node: Any, parts: list[str], text: str, full: str, hint: Any) -> Any:
    if isinstance(node, Config):
        parts = [*node.moved_fields.get(parts[0], parts[0]).split("."), *parts[1:]]
    name, rest = parts[0], parts[1:]
    if dataclasses.is_dataclass(node):
        hints = field_hints(type(node))
        names = [field.name for field in dataclasses.fields(node) if field.init]
        if name not in names:
            raise ConfigError(_unknown(full, name, names, type(node).__name__))
        child, child_hint = getattr(node, name), hints[name]
        value = _assign(child, rest, text, full, child_hint) if rest else parse(text, child_hint, full)
        check_value(value, declared(type(node))[name], full.removesuffix("".join(f".{part}" for part in rest)))
        return dataclasses.replace(node, **{name: value})
    if isinstance(node, tuple):
        if not name.isdecimal() or int(name) >= len(node):
            raise ConfigError(
                f"{full}: {name!r} is not an index into a tuple of {len(node)} items (0..{len(node) - 1})."
            )
        index = int(name)
        child_hint = item_hint(hint, index)
        value = _assign(node[index], rest, text, full, child_hint) if rest else parse(text, child_hint, full)
        return (*node[:index], value, *node[index + 1 :])
    if isinstance(node, dict):
        if rest and name not in node:
            raise ConfigError(_unknown(full, name, list(node), "this mapping"))
        child_hint = typing.get_args(hint)[1] if typing.get_args(hint) else Any
        value = _assign(node[name], rest, text, full, child_hint) if rest else parse(text, child_hint, full)
        return {**node, name: value}
    raise ConfigError(
        f"{full}: cannot go below {name!r}, because the value above it is {node!r}, not a group of fields."
    )


def _unknown(full: str, name: str, names: list[str], owner: str) -> str:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"It has: {', '.join(sorted(names))}."
    return f"{full}: {owner} has no field {name!r}. {hint}"


def parse(text: str, hint: Any, path: str = "value") -> Any:
    """Parse the text of one command-line value by a type annotation; raises ConfigError if it does not fit."""
    for option in options(hint):
        try:
            return _parse_one(text, option, path)
        except _NoFit:
            continue
    raise ConfigError(f"{path} = {text!r}: expected {describe(hint)}.")


class _NoFit(Exception):
    pass


def _parse_one(text: str, hint: Any, path: str) -> Any:
    origin = typing.get_origin(hint)
    if hint is type(None):
        if text.lower() in ("none", "null"):
            return None
    elif hint is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
    elif hint is int:
        try:
            return int(text.replace("_", ""))
        except ValueError:
            pass
    elif hint is float:
        try:
            return float(text)
        except ValueError:
            pass
    elif hint in (str, Any):
        return text
    elif origin is typing.Literal:
        for choice in typing.get_args(hint):
            if text == str(choice):
                return choice
    elif isinstance(hint, type) and issubclass(hint, enum.Enum):
        for member in hint:
            if text in (member.name, str(member.value)):
                return member
    elif origin is tuple:
        items, arguments = _items(text, hint), typing.get_args(hint)
        if arguments[1:] == (Ellipsis,) or len(items) == len(arguments):
            return tuple(parse(item, item_hint(hint, index), path) for index, item in enumerate(items))
    elif dataclasses.is_dataclass(hint):
        names = ", ".join(field.name for field in dataclasses.fields(hint))
        raise ConfigError(f"{path} = {text!r}: this is a group of fields; set one of them instead ({path}.X: {names}).")
    raise _NoFit


def _items(text: str, hint: Any) -> list[str]:
    """The items of a tuple: `1,2`, `(1, 2)`, or as Python writes it. A regular expression keeps its own brackets."""
    if str in typing.get_args(hint):
        try:
            items = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            items = None
        if isinstance(items, (tuple, list)) and all(isinstance(item, str) for item in items):
            return list(items)
    elif (text[:1], text[-1:]) in (("(", ")"), ("[", "]")):
        text = text[1:-1]
    items, depth = [""], 0
    for character in text:
        # A comma within brackets, as in a{1,2}, is part of an item.
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth <= 0:
            items.append("")
        else:
            items[-1] += character
    return [item.strip() for item in items if item.strip()]


def load(path: str | Path) -> Any:
    """Load a config file: run the Python file and return what its function `experiment()` returns.

    Modules beside the file can be imported, by it and later: its folder is appended to `sys.path`.

    Args:
      path: `NAME.py`, or `NAME.py:ARGUMENTS` with comma-separated arguments of `experiment`, each a value or
        `name=value`, parsed by the parameter's annotation: `configs/cv_vae.py:sd3`.

    Raises:
      ConfigError: no such file (with the nearest file names), a file without `experiment()`, arguments that it does
        not take, or an error that the file itself raises (with its line).
    """
    file, _, arguments = str(path).partition(".py:")
    file = Path(f"{file}.py") if arguments else Path(path)
    function = _experiment_function(file)
    chosen = _arguments(function, arguments, str(path))
    try:
        inspect.signature(function).bind(**chosen)
    except TypeError as error:
        raise ConfigError(f"{path}: experiment() has {error}; write {file}:VALUE or {file}:NAME=VALUE.") from error
    with _mistakes_in(file):
        return function(**chosen)


@contextlib.contextmanager
def _mistakes_in(file: Path) -> Iterator[None]:
    """What a config file raises becomes a `ConfigError` with its line; errors inside of libraries stay as they are."""
    try:
        yield
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame.lineno for frame in frames if _same_file(frame.filename, file)]
        last = next((f for f in reversed(frames) if f.filename != __file__ and "importlib" not in f.filename), None)
        line = error.lineno if isinstance(error, SyntaxError) and _same_file(error.filename, file) else None
        line = line or (own[-1] if own else None)
        place = f"{file}, line {line}" if line else str(file)
        if isinstance(error, ConfigError):
            raise ConfigError(f"{place}: {error}") from error
        # A name that cannot be imported is looked for by a library's code.
        if isinstance(error, (ImportError, SyntaxError)) or last is None or _same_file(last.filename, file):
            text = error.msg if isinstance(error, SyntaxError) else str(error)
            raise ConfigError(f"{place}: {type(error).__name__}: {text}. Correct the config file.") from error
        raise


def _same_file(name: str | None, file: Path) -> bool:
    return name is not None and Path(name).absolute() == file.absolute()


def variants(path: str | Path) -> list[str]:
    """What `load` takes for a config file: once per choice, if the first parameter of `experiment` has choices."""
    function = _experiment_function(Path(path))
    for name in inspect.signature(function).parameters:
        choices = typing.get_args(field_hints(function)[name])
        return [f"{path}:{choice}" for choice in choices]
    return [str(path)]


def _experiment_function(path: Path) -> Callable[..., Any]:
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path("configs")
        names = [str(p) for p in sorted(folder.glob("*.py"))]
        near = difflib.get_close_matches(str(path), names, n=3, cutoff=0.4)
        tail = (
            f"Did you mean {' or '.join(near)}?"
            if near
            else f"Config files in {folder}/: {', '.join(names) or 'none'}."
        )
        raise ConfigError(f"config file {str(path)!r} does not exist. {tail}")
    if path.suffix != ".py":
        raise ConfigError(f"{path}: a config file is a Python file, NAME.py, with a function experiment().")
    spec = importlib.util.spec_from_file_location(f"jvgen_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    # As for a script, but last: modules beside the file can be imported, and hide none that is installed.
    folder = str(path.parent.absolute())
    if folder not in sys.path:
        sys.path.append(folder)
    with _mistakes_in(path):
        # Not exec_module: it leaves bytecode beside the file, and reads it back if an edit keeps size and second.
        exec(spec.loader.source_to_code(path.read_bytes(), str(path)), module.__dict__)
    function = getattr(module, "experiment", None)
    if not callable(function):
        raise ConfigError(f"{path}: a config file defines a function experiment() that returns an Experiment.")
    return function


def _arguments(function: Callable[..., Any], text: str, path: str) -> dict[str, Any]:
    """Keyword arguments of a function from `value,name=value`."""
    names = list(inspect.signature(function).parameters)
    hints, rules, chosen = field_hints(function), declared(function), {}
    for number, word in enumerate(word.strip() for word in text.split(",") if word.strip()):
        name, separator, value = word.partition("=")
        if not separator:
            name, value = names[number] if number < len(names) else word, word
        if name not in names or name in chosen:
            raise ConfigError(
                f"{path}: experiment() takes {', '.join(names) or 'no arguments'}; {word!r} is none of them."
            )
        chosen[name] = parse(value, hints.get(name, Any), f"{path}: {name}")
        check_value(chosen[name], rules.get(name, Any), f"{path}: {name}")
    return chosen


def dump(config: Any, path: str = "") -> str:
    """One line per field, `dotted.path = value`, in field order. Stable: made for text diffs and golden files."""
    return "\n".join(f"{name} = {value}" for name, value in leaves(config, path)) + "\n"


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted path and printed value of every field, in field order; the class name for a group of fields."""
    if dataclasses.is_dataclass(node):
        yield (path or "(root)"), type(node).__name__
        for field in dataclasses.fields(node):
            yield from leaves(getattr(node, field.name), f"{path}.{field.name}".lstrip("."))
    elif isinstance(node, tuple) and any(dataclasses.is_dataclass(item) for item in node):
        for index, item in enumerate(node):
            yield from leaves(item, f"{path}.{index}")
    elif isinstance(node, dict) and node:
        for key, item in node.items():
            yield from leaves(item, f"{path}.{key}")
    else:
        yield path, repr(node.value if isinstance(node, enum.Enum) else node)
