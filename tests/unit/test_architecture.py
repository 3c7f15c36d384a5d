"""Who may import whom: the floors of the house, checked on the import graph."""

from pathlib import Path

import grimp
import pytest

# From the top. A module imports from lower floors, from its own room, and never upwards.
FLOORS = [
    {"cli", "cli_coding", "cli_data", "cli_play", "cli_sample", "demo", "demo_report"},
    {"preflight", "generation"},
    {"training", "experiment"},
    {"tasks", "interop", "control"},
    {"models"},
    {"nn", "data", "evaluation"},
    {"kernels", "diffusion", "losses", "geometry", "parallel", "config", "terminal"},
]
# Rooms on one floor that depend on each other on purpose: the second is read by the first.
NEIGHBOURS = {
    ("experiment", "training"),
    ("training", "experiment"),
    ("tasks", "interop"),
    ("cli", "demo"),
    ("cli", "cli_coding"),
    ("cli_coding", "cli_data"),
    ("cli", "cli_data"),
    ("cli", "cli_play"),
    ("cli", "cli_sample"),
    ("cli_sample", "cli_data"),
    ("demo", "demo_report"),
}
LEVEL = {room: level for level, floor in enumerate(FLOORS) for room in floor}
# config is the cellar: everyone reads it, and so may its own floor.
CELLAR = {"config", "parallel", "terminal"}


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph("jvgen")


def room(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def test_every_module_lives_in_a_known_room(graph):
    unknown = {room(m) for m in graph.modules if room(m)} - set(LEVEL)
    assert not unknown, f"rooms without a floor: {sorted(unknown)}"


def test_imports_point_downwards(graph):
    wrong = []
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            here, there = room(module), room(imported)
            if here is None or there is None or here == there or there in CELLAR or (here, there) in NEIGHBOURS:
                continue
            if LEVEL[there] <= LEVEL[here]:
                wrong.append(f"{module} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_the_corridor_has_no_circles(graph):
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            assert module not in graph.find_downstream_modules(module) or module == imported, module


def test_models_do_not_know_each_other_and_torch_is_never_imported_at_the_top():
    root = Path(__file__).parents[2] / "jvgen"
    for path in root.rglob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            top_level = line.startswith(("import ", "from "))
            names = ("torch", "diffusers", "transformers", "tensorflow")
            if top_level and line.split()[1].split(".")[0] in names:
                raise AssertionError(f"{path}:{number}: {line}")


def test_no_grab_bags():
    root = Path(__file__).parents[2] / "jvgen"
    bad = [p for p in root.rglob("*.py") if p.stem in {"utils", "helpers", "common", "misc"}]
    assert not bad
