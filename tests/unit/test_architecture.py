"""Who may import whom: the layers of jvgen, checked on the import graph and in ARCHITECTURE.md."""

import ast
import os
import sys
from pathlib import Path

import grimp
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from layers import INNER_LAYERS, JVGEN, LAYERS, table

DOCUMENT = JVGEN.parent / "ARCHITECTURE.md"
BEGIN, END = "<!-- layers -->", "<!-- end of layers -->"


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph("jvgen")


def upward_imports(graph, root: str, layers: list[list[str]]) -> list[str]:
    """Imports below `root` that point to a higher layer, or to another package of the same layer."""
    levels = {f"{root}.{name}": level for level, layer in enumerate(layers) for name in layer}

    def package(module: str) -> str:
        return ".".join(module.split(".")[: root.count(".") + 2])

    wrong = []
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            here, there = package(module), package(imported)
            if here != there and here in levels and there in levels and levels[there] <= levels[here]:
                wrong.append(f"{module} imports {imported}")
    return wrong


def test_every_package_has_a_layer(graph):
    packages = {module.split(".")[1] for module in graph.modules if module.count(".")}
    assert packages <= {name for layer in LAYERS for name in layer}


def test_imports_point_downward(graph):
    assert not upward_imports(graph, "jvgen", LAYERS)


@pytest.mark.parametrize("package", INNER_LAYERS)
def test_imports_inside_a_package_point_downward(graph, package):
    assert not upward_imports(graph, f"jvgen.{package}", INNER_LAYERS[package])


def test_no_import_cycles(graph):
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            assert module not in graph.find_downstream_modules(module) or module == imported, module


def test_architecture_document_has_todays_layers():
    text = DOCUMENT.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    expected = f"{before}{BEGIN}\n{table()}\n{END}{after}"
    if os.environ.get("JVGEN_UPDATE_DOCS"):
        DOCUMENT.write_text(expected)
    assert expected == text or os.environ.get("JVGEN_UPDATE_DOCS"), (
        "run JVGEN_UPDATE_DOCS=1 pytest tests/unit/test_architecture.py and commit ARCHITECTURE.md"
    )


def test_every_package_says_what_belongs_there():
    short = []
    for file in JVGEN.rglob("__init__.py"):
        docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
        if len(docstring.split()) < 8:
            short.append(str(file.relative_to(JVGEN)))
    assert not short, f"say in a paragraph what belongs into these packages and what does not: {short}"


def test_pytorch_and_tensorflow_are_never_imported_at_the_top():
    for path in JVGEN.rglob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            names = ("torch", "diffusers", "transformers", "tensorflow")
            if line.startswith(("import ", "from ")) and line.split()[1].split(".")[0] in names:
                raise AssertionError(f"{path}:{number}: {line}")


def test_no_grab_bag_modules():
    assert not [path for path in JVGEN.rglob("*.py") if path.stem in {"utils", "helpers", "common", "misc"}]
