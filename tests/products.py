"""The matrix products and convolutions of a program, before and after compilation, for tests of precision."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax


class Product(NamedTuple):
    """One product: dtypes and shapes of its operands, and its precision in JAX's or XLA's words, in capitals."""

    kind: str
    dtypes: tuple[str, str]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    precision: str

    @property
    def is_float32(self) -> bool:
        return self.dtypes == ("float32", "float32")


def traced(program: Any, *arguments: Any) -> list[Product]:
    """The products of a function or of a `jax.stages.Traced`, with those of loops, branches and gradients."""
    closed = jax.make_jaxpr(program)(*arguments)
    return [_product(equation) for equation in _equations(closed.jaxpr)]


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


def _product(equation: Any) -> Product:
    left, right = (variable.aval for variable in equation.invars[:2])
    precision = equation.params["precision"]
    names = {str(part) for part in (precision if isinstance(precision, tuple) else (precision,))}
    return Product(
        equation.primitive.name, (left.dtype.name, right.dtype.name), (left.shape, right.shape), "/".join(sorted(names))
    )


def compiled(text: str) -> list[Product]:
    """The products in the text of a compiled program: on TPUs convolutions all of them. Shapes are left out."""
    types = dict(re.findall(r"(%[\w.-]+) = (\w+)\[", text))
    found = []
    for operands, rest in re.findall(r" (?:convolution|dot)\(([^)]*)\)(.*)", text):
        names = re.findall(r"%[\w.-]+", operands)
        dtypes = tuple({"f32": "float32", "bf16": "bfloat16"}.get(types[name], types[name]) for name in names)
        precision = re.search(r"operand_precision=\{(\w+),(\w+)\}", rest)
        words = {"DEFAULT"} if precision is None else {word.upper() for word in precision.groups()}
        found.append(Product("product", dtypes, ((), ()), "/".join(sorted(words))))
    return found
