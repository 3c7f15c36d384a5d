"""Pages made from the code as it is written: configs, the stable interface, and the command from its parsers.

Classes and functions are read, not imported. Docstrings are Google's style in Markdown: their text goes into the page
as it is.
"""

import argparse
import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

# Pages of the config reference: title, and the packages whose classes they have.
AREAS = {
    "run": ("The run: training, optimizer, mesh", ("training", "parallel", "runs")),
    "data": ("Data", ("data",)),
    "tasks": ("Tasks and diffusion", ("tasks", "diffusion", "losses", "reinforcement")),
    "networks": ("Networks", ("models", "nn")),
    "control": ("Planning and agents", ("control",)),
}
NAMESPACES = ("jvgen", "control", "data", "evaluation", "geometry", "models")
_SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Yields", "Example", "Examples")


def pages(root: Path) -> dict[str, str]:
    """Every page of the reference, by its place in the site."""
    homes = _constant(root / "jvgen/saved_config.py", "HOMES")
    found = {"configs/files.md": _config_files(root), "configs/values.md": _values(root)}
    for area, (title, packages) in AREAS.items():
        classes = {name: module for name, module in homes.items() if module.split(".")[1] in packages}
        found[f"configs/{area}.md"] = _config_page(root, title, classes)
    for namespace in NAMESPACES:
        found[f"api/{namespace}.md"] = _namespace_page(root, namespace)
    found["commands.md"] = _commands()
    return found


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _constant(path: Path, name: str) -> dict:
    for node in _tree(path).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id == name:
            return ast.literal_eval(node.value)
    raise LookupError(f"{path}: has no {name}")


def _file(root: Path, module: str) -> Path:
    path = root / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _definition(root: Path, module: str, name: str) -> ast.stmt:
    """The class, function or assignment that a module has under a name, or that it imports."""
    for node in _tree(_file(root, module)).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return node
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return node
        if isinstance(node, ast.ImportFrom) and name in [alias.asname or alias.name for alias in node.names]:
            return _definition(root, str(node.module), name)
    raise LookupError(f"{module} has no {name}")


def _parts(docstring: str | None) -> tuple[str, dict[str, str]]:
    """The text of a docstring before its sections, and each section."""
    parts = re.split(rf"(?m)^({'|'.join(_SECTIONS)}):[ ]*$", docstring or "")
    return parts[0].strip(), {name: text.strip("\n") for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def _items(section: str) -> Iterator[tuple[str, str]]:
    """Names and texts of a section's entries, whose later lines are indented more."""
    indent = len(section) - len(section.lstrip())
    for entry in re.split(rf"(?m)^ {{{indent}}}(?=\S)", "\n" + section):
        if entry.strip():
            name, _, text = entry.partition(":")
            yield name.strip(), re.sub(r"\s+", " ", text).strip()


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")


def _text(node: ast.AST | None) -> str:
    return "" if node is None else ast.unparse(node)


def _config_page(root: Path, title: str, classes: dict[str, str]) -> str:
    return "\n".join([f"# {title}\n", *(_config(root, name, module) for name, module in sorted(classes.items()))])


def _config(root: Path, name: str, module: str) -> str:
    node = _definition(root, module, name)
    assert isinstance(node, ast.ClassDef)
    text, sections = _parts(ast.get_docstring(node))
    meanings: dict[str, str] = {}
    for names, meaning in _items(sections.get("Attributes", "")):
        meanings |= dict.fromkeys(names.split(", "), meaning)
    rows = [
        f"* **`{field.target.id}`**: `{_text(field.annotation)}{_default(field.value)}`  \n"
        f"  {meanings.get(field.target.id, '')}"
        for field in node.body
        if isinstance(field, ast.AnnAssign) and not _text(field.annotation).startswith("ClassVar")
    ]
    bases = [_text(base) for base in node.bases if _text(base) != "Config"]
    also = f"\n\nIt also has the fields of {' and '.join(f'`{base}`' for base in bases)}." if bases else ""
    return f"(config-{name.lower()})=\n\n## {name}\n\n`{module}`. {text}{also}\n\n" + "\n".join([*rows, ""])


def _default(value: ast.expr | None) -> str:
    return "" if value is None else f" = {_text(value)}"


def _config_files(root: Path) -> str:
    out = ["# Shipped configs\n", "What each file opens with; its name links to its text.\n"]
    for path in sorted((root / "configs").glob("*.py")):
        docstring = ast.get_docstring(_tree(path)) or ""
        out.append(f"## {path.name}\n\n[{path.name}](../source/configs.{path.name}.md)\n\n{docstring}\n")
    return "\n".join(out)


def _values(root: Path) -> str:
    rows = []
    for node in _tree(root / "jvgen/value_rules.py").body:
        if isinstance(node, ast.Assign) and _text(node.value).startswith("Annotated["):
            rows.append(f"| `{_text(node.targets[0])}` | `{_cell(_text(node.value))}` |")
    head = "Types in the tables of this reference. A value outside the bounds is refused with field, value and rule.\n"
    return "\n".join(["# Numbers with rules\n", head, "| type | rule |", "|---|---|", *rows, ""])


def _namespace_page(root: Path, namespace: str) -> str:
    package = root / "jvgen" if namespace == "jvgen" else root / "jvgen" / namespace
    modules = _constant(package / "__init__.py", "_MODULES")
    prefix = "jvgen" if namespace == "jvgen" else f"jvgen.{namespace}"
    docstring = ast.get_docstring(_tree(package / "__init__.py"))
    out = [f"# {prefix}\n", f"```{{py:module}} {prefix}\n```\n", f"{docstring}\n"]
    for name, module in sorted(modules.items(), key=lambda item: item[0].lower()):
        if module != name:
            out.append(_entry(_definition(root, f"jvgen.{module}", name), name, f"jvgen.{module}"))
    return "\n".join(out)


def _entry(node: ast.stmt, name: str, module: str) -> str:
    """One public name as a directive of Sphinx's Python domain, with an anchor and a place in the search."""
    where = f"From `{module}`.\n"
    if isinstance(node, ast.ClassDef):
        body = [where, _body(ast.get_docstring(node))]
        for method in node.body:
            shown = isinstance(method, ast.FunctionDef) and not method.name.startswith("_")
            if shown and ast.get_docstring(method):
                kinds = [_text(decorator) for decorator in method.decorator_list]
                if "property" in kinds or "functools.cached_property" in kinds:
                    body.append(_directive("property", method.name, _body(ast.get_docstring(method)), 3))
                else:
                    extra = next((kind for kind in kinds if kind in ("classmethod", "staticmethod")), "")
                    body.append(
                        _directive("method", _signature(method, True), _body(ast.get_docstring(method)), 3, extra)
                    )
        return _directive("class", name, "\n".join(body), 4)
    if isinstance(node, ast.FunctionDef):
        return _directive("function", _signature(node, False), f"{where}\n{_body(ast.get_docstring(node))}", 4)
    value = _text(getattr(node, "value", None))
    return _directive("data", name, f"{where}\n```python\n{name} = {value[:600]}\n```", 4)


def _directive(kind: str, head: str, body: str, ticks: int, option: str = "") -> str:
    fence = "`" * (ticks + 1)
    return f"{fence}{{py:{kind}}} {head}\n" + (f":{option}:\n" if option else "") + f"\n{body}\n{fence}\n"


def _signature(node: ast.FunctionDef, method: bool) -> str:
    arguments = node.args
    if method and "staticmethod" not in [_text(decorator) for decorator in node.decorator_list]:
        arguments = ast.parse(f"def f({_text(arguments)}): pass").body[0].args
        (arguments.posonlyargs or arguments.args).pop(0)
    returns = f" -> {_text(node.returns)}" if node.returns is not None else ""
    return f"{node.name}({_text(arguments)}){returns}"


def _body(docstring: str | None) -> str:
    text, sections = _parts(docstring)
    out = [text]
    for name, section in sections.items():
        if name in ("Args", "Attributes", "Raises"):
            rows = "\n".join(f"* `{item}`: {meaning}" for item, meaning in _items(section))
            out.append(f"**{'Arguments' if name == 'Args' else name}**\n\n{rows}")
        elif name.startswith("Example"):
            out.append(f"**Example**\n\n```python\n{_dedented(section)}\n```")
        else:
            words = " ".join(section.split())
            out.append(f"**{name}** {words}")
    return "\n\n".join(out) + "\n"


def _dedented(text: str) -> str:
    indent = len(text) - len(text.lstrip())
    return "\n".join(line[indent:] for line in text.splitlines())


def _commands() -> str:
    """`jvgen --help` and that of every sub-command, from its parsers."""
    os.environ["COLUMNS"] = "100"
    from jvgen.cli.main import build_parser

    out = ["# The command\n", "What `jvgen COMMAND --help` prints.\n"]
    for depth, prog, parser in _parsers(build_parser(), 1):
        out.append(f"{'#' * min(depth + 1, 4)} {prog}\n\n```text\n{parser.format_help().rstrip()}\n```\n")
    return "\n".join(out)


def _parsers(parser: argparse.ArgumentParser, depth: int) -> Iterator[tuple]:
    yield depth, parser.prog, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in dict.fromkeys(action.choices.values()):
                yield from _parsers(child, depth + 1)
