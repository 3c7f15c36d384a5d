"""Equations as MathML, which browsers show without a script: Sphinx's own renderers load one from another site."""

from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx


def mathml(equation: str, **options: Any) -> str:
    """LaTeX as MathML; raises `ValueError` for commands that the converter does not know and would show as they are."""
    made = convert(equation, **options)
    if "\\" in made:
        raise ValueError(f"equation {equation!r}: has a command that latex2mathml does not know; write it another way.")
    return made


def _inline(writer: Any, node: nodes.math) -> None:
    writer.body.append(mathml(node.astext()))
    raise nodes.SkipNode


def _block(writer: Any, node: Any) -> None:
    writer.body.append(f'<div class="equation">{mathml(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the renderer `mathml`."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
