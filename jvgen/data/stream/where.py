"""Filters on the columns of an index, such as "aesthetic > 5 and license in ('cc-by', 'cc0')".

A filter is parsed into Python's syntax tree, of which a few kinds of nodes are understood; nothing is executed. It is
evaluated on whole columns. As in SQL a comparison with a missing value is neither true nor false, so neither
`aesthetic > 5` nor `not aesthetic > 5` takes a record without a score; `aesthetic is None` does.
"""

import ast
import difflib
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from jvgen.data.store.index import NUMBERS, Index
from jvgen.data.store.records import KINDS
from jvgen.data.store.strings import Strings, Text

_COMPARE: dict[type[ast.cmpop], Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    ast.Lt: np.less,
    ast.LtE: np.less_equal,
    ast.Gt: np.greater,
    ast.GtE: np.greater_equal,
    ast.Eq: np.equal,
    ast.NotEq: np.not_equal,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    ast.Add: np.add,
    ast.Sub: np.subtract,
    ast.Mult: np.multiply,
    ast.Div: np.divide,
}
_MAX_LISTED = 8
_MAX_LENGTH = 10_000
# Rows that are filtered at a time, so that their numbers need little memory.
_CHUNK = 1 << 18
SYNTAX = (
    "Write comparisons of columns with numbers or texts (<, <=, >, >=, ==, !=, in, not in, is None), joined by and, or "
    "and not, for example \"aesthetic > 5 and license in ('cc-by', 'cc0')\"."
)


class FilterError(ValueError):
    """A filter that cannot be parsed, or that does not fit the columns; the message says what to write instead."""


class _Truth(NamedTuple):
    """Where a condition is true and where it is false, bool; it is neither where values are missing."""

    true: np.ndarray
    false: np.ndarray


_Value = np.ndarray | float | str | Text | tuple[float | str, ...] | None


@functools.lru_cache(maxsize=64)
def parse(where: str) -> ast.expr:
    """The syntax tree of a filter.

    Raises:
      FilterError: not a filter.
    """
    try:
        if len(where) > _MAX_LENGTH:
            raise FilterError(f"{len(where)} characters, at most {_MAX_LENGTH}.")
        tree = ast.parse(where.strip(), mode="eval").body
        _check(tree)
    except SyntaxError as error:
        raise FilterError(f"not a filter ({error.msg}, at character {error.offset or 0}). {SYNTAX}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, FilterError):
            raise
        raise FilterError(f"not a filter ({error}). {SYNTAX}") from None
    if not isinstance(tree, ast.BoolOp | ast.Compare | ast.UnaryOp | ast.Name):
        raise FilterError(f"{ast.unparse(tree)} is not a condition. {SYNTAX}")
    return tree


def names(where: str) -> list[str]:
    """Names of the columns that a filter uses."""
    return sorted({node.id for node in ast.walk(parse(where)) if isinstance(node, ast.Name)})


def rows_that_fit(where: str, index: Index) -> np.ndarray:
    """Which rows of an index a filter takes, bool.

    Raises:
      FilterError: a column that the index does not have, or a comparison that does not fit it.
    """
    tree, fits = parse(where), np.zeros(len(index), bool)
    known = _columns(index)
    for name in names(where):
        if name not in known:
            raise FilterError(_unknown(name, index))
    for start in range(0, len(index), _CHUNK):
        part = slice(start, min(start + _CHUNK, len(index)))
        fits[part] = _truth(tree, {name: known[name](part) for name in names(where)}, part.stop - part.start).true
    if not len(index):
        _truth(tree, {name: known[name](slice(0, 0)) for name in names(where)}, 0)
    return fits


def summary(where: str, index: Index) -> str:
    """What the columns that a filter uses have, for messages."""
    known, lines = _columns(index), []
    for name in names(where):
        column = known[name](slice(None))
        if isinstance(column, Text):
            counts = column.counts()
            shown = [f"{value!r} ({count})" for value, count in list(counts.items())[:_MAX_LISTED]]
            lines.append(f"{name}: {', '.join(shown)}{' ...' if len(counts) > _MAX_LISTED else ''}")
        else:
            there = column[~np.isnan(column)]
            missing = len(column) - len(there)
            span = f"{there.min():g}..{there.max():g}" if len(there) else "no values"
            lines.append(f"{name}: {span}" + (f", missing in {missing} records" if missing else ""))
    return "; ".join(lines)


def _columns(index: Index) -> dict[str, Callable[[slice], np.ndarray | Text]]:
    def number(name: str) -> Callable[[slice], np.ndarray]:
        return lambda part: np.asarray(getattr(index, name)[part], np.float64)

    kinds = Strings.of(sorted(KINDS))
    codes = np.array([sorted(KINDS).index(kind) for kind in KINDS], np.int32)
    found: dict[str, Callable[[slice], np.ndarray | Text]] = {
        name: number(name) for name in NUMBERS if name not in ("kind", "checksum")
    }
    found["kind"] = lambda part: Text(codes[index.kind[part]], kinds)
    for name, column in index.columns.items():
        found[name] = column.__getitem__
    return found


def _unknown(name: str, index: Index) -> str:
    known = sorted(_columns(index))
    near = difflib.get_close_matches(name, known, n=2)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    free = ", ".join(sorted(index.columns)) or "none; `jvgen data score` computes some"
    return (
        f"no column {name!r}.{hint} Its own columns: {free}; every data set has "
        f"{', '.join(name for name in known if name not in index.columns)}."
    )


def _check(node: ast.expr) -> None:
    """Raise `FilterError` for nodes that filters do not have."""
    match node:
        case ast.BoolOp(values=values):
            parts = values
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            parts = [operand]
        case ast.BinOp(op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div(), left=left, right=right):
            parts = [left, right]
        case ast.Compare(left=left, comparators=comparators):
            parts = [left, *comparators]
        case ast.Tuple(elts=elements) | ast.List(elts=elements) | ast.Set(elts=elements):
            parts = elements
        case ast.Name():
            parts = []
        case ast.Constant(value=int(value)) if abs(value) > 2**53:
            raise FilterError(f"{str(value)[:20]}...: as a number it would be rounded; numbers end at 2**53.")
        case ast.Constant(value=value) if value is None or isinstance(value, int | float | str):
            parts = []
        case _:
            raise FilterError(f"{ast.unparse(node)!r} cannot be used in a filter. {SYNTAX}")
    for part in parts:
        _check(part)


def _truth(node: ast.expr, columns: Mapping[str, np.ndarray | Text], rows: int) -> _Truth:
    match node:
        case ast.BoolOp(op=operator, values=values):
            parts = [_truth(value, columns, rows) for value in values]
            every, some = np.logical_and.reduce, np.logical_or.reduce
            trues, falses = [part.true for part in parts], [part.false for part in parts]
            return (
                _Truth(every(trues), some(falses))
                if isinstance(operator, ast.And)
                else _Truth(some(trues), every(falses))
            )
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            part = _truth(operand, columns, rows)
            return _Truth(part.false, part.true)
        case ast.Compare(left=left, ops=operators, comparators=comparators):
            sides = [left, *comparators]
            parts = [
                _comparison(node, operator, _value(one, columns), _value(other, columns), rows)
                for one, operator, other in zip(sides, operators, comparators, strict=False)
            ]
            return _Truth(
                np.logical_and.reduce([part.true for part in parts]),
                np.logical_or.reduce([part.false for part in parts]),
            )
        case ast.Name(id=name):
            column = columns[name]
            if isinstance(column, Text):
                raise FilterError(f"{name} has texts and is no condition; compare it, for example {name} == 'a'.")
            return _Truth(np.nan_to_num(column) != 0, column == 0)
    raise FilterError(f"{ast.unparse(node)!r} is not a condition. {SYNTAX}")


def _value(node: ast.expr, columns: Mapping[str, np.ndarray | Text]) -> _Value:
    match node:
        case ast.Name(id=name):
            return columns[name]
        case ast.Constant(value=value):
            return float(value) if isinstance(value, int | float) else value
        case ast.Tuple(elts=elements) | ast.List(elts=elements) | ast.Set(elts=elements):
            values = tuple(_value(element, columns) for element in elements)
            if any(not isinstance(value, float | str) for value in values) or len({type(v) for v in values}) > 1:
                raise FilterError(f"{ast.unparse(node)}: a list of numbers, or of texts.")
            return values
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_number(operand, columns)
        case ast.BinOp(left=left, op=operator, right=right):
            with np.errstate(divide="ignore", invalid="ignore"):
                result = _ARITHMETIC[type(operator)](_number(left, columns), _number(right, columns))
            return np.where(np.isfinite(result), result, np.nan)  # the rate of an image has no inverse
    raise FilterError(f"{ast.unparse(node)!r} is not a value. {SYNTAX}")


def _number(node: ast.expr, columns: Mapping[str, np.ndarray | Text]) -> np.ndarray:
    value = _value(node, columns)
    if not isinstance(value, float | np.ndarray):
        raise FilterError(f"{ast.unparse(node)!r} is not a number.")
    return np.asarray(value, np.float64)


def _comparison(node: ast.Compare, operator: ast.cmpop, one: _Value, other: _Value, rows: int) -> _Truth:
    text = ast.unparse(node)
    if isinstance(operator, ast.Is | ast.IsNot) or one is None or other is None:
        is_test = isinstance(operator, ast.Is | ast.IsNot)
        if not is_test or other is not None or not isinstance(one, Text | np.ndarray):
            raise FilterError(f"{text}: write `column is None` for records without a value.")
        missing = one.codes == one.code("") if isinstance(one, Text) else np.isnan(one)
        missing = np.broadcast_to(missing, (rows,))
        return _Truth(missing, ~missing) if isinstance(operator, ast.Is) else _Truth(~missing, missing)
    if isinstance(operator, ast.In | ast.NotIn):
        if not isinstance(other, tuple) or not isinstance(one, Text | np.ndarray):
            raise FilterError(f"{text}: write `column in (value, value)`.")
        parts = [_equal(text, one, value, rows) for value in other]
        nowhere = np.zeros(rows, bool)
        found = _Truth(
            np.logical_or.reduce([nowhere, *(part.true for part in parts)]),
            np.logical_and.reduce([~nowhere, *(part.false for part in parts)]),
        )
        return _Truth(found.false, found.true) if isinstance(operator, ast.NotIn) else found
    if isinstance(one, tuple) or isinstance(other, tuple):
        raise FilterError(f"{text}: lists are for `in`.")
    if isinstance(other, Text) and not isinstance(one, Text):
        one, other, operator = other, one, _SWAPPED.get(type(operator), type(operator))()
    if isinstance(one, Text | str) or isinstance(other, Text | str):
        if not isinstance(operator, ast.Eq | ast.NotEq):
            raise FilterError(f"{text}: texts are compared with ==, != and in.")
        found = _equal(text, one, other, rows)
        return found if isinstance(operator, ast.Eq) else _Truth(found.false, found.true)
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    there = ~(np.isnan(one) | np.isnan(other))
    true = _COMPARE[type(operator)](one, other) & there
    return _Truth(np.broadcast_to(true, (rows,)), np.broadcast_to(there & ~true, (rows,)))


_SWAPPED = {ast.Lt: ast.Gt, ast.Gt: ast.Lt, ast.LtE: ast.GtE, ast.GtE: ast.LtE}


def _equal(text: str, one: _Value, other: _Value, rows: int) -> _Truth:
    if isinstance(one, Text) and isinstance(other, str):
        true = one.codes == one.code(other)
        # A missing text is equal to "" only.
        there = one.codes != one.code("") if other else np.ones(rows, bool)
        return _Truth(true, there & ~true)
    if isinstance(one, np.ndarray) and isinstance(other, float):
        return _Truth(one == other, ~np.isnan(one) & (one != other))
    if isinstance(one, Text) and isinstance(other, float):
        raise FilterError(f"{text}: the column has texts; write the value in quotes.")
    if isinstance(one, np.ndarray) and isinstance(other, str):
        raise FilterError(f"{text}: the column has numbers; write the value without quotes.")
    raise FilterError(f"{text}: compare a column with a value.")
