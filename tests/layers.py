"""The layers of jvgen, from the top: a module imports from lower layers and from its own package. One list for the
import test and for the table in ARCHITECTURE.md, which is made of it and of the packages' docstrings."""

import ast
from pathlib import Path

JVGEN = Path(__file__).parents[1] / "jvgen"

LAYERS: list[list[str]] = [
    ["cli"],
    ["runs", "preflight", "launch"],
    ["demo", "reinforcement"],
    ["training", "autoencoding", "control"],
    ["tasks"],
    ["interop"],
    ["models"],
    ["losses", "nn"],
    ["data", "evaluation", "diffusion", "parallel"],
    ["geometry", "kernels", "saved_config"],
    ["storage"],
    ["config", "finite"],
    [
        "exit_codes",
        "field_types",
        "lazy_names",
        "nested",
        "precision",
        "protobuf_wire",
        "terminal",
        "value_rules",
        "versions",
    ],
]

# The same inside two packages. Modules that are not listed are unrestricted.
INNER_LAYERS: dict[str, list[list[str]]] = {
    "data": [["builders"], ["stream", "scenes"], ["store"], ["video_files"]],
    "training": [
        ["loop"],
        ["session"],
        ["checkpoint", "evaluation"],
        ["program"],
        ["step", "telemetry"],
        ["state"],
        ["optimization"],
    ],
}


def table() -> str:
    """The layers as a Markdown table: layer, package, first sentence of its docstring."""
    rows = ["| layer | package | what belongs there |", "|---|---|---|"]
    present = [[name for name in layer if _source(name) is not None] for layer in LAYERS]
    for number, layer in zip(range(len(present), 0, -1), present, strict=True):
        for name in layer:
            docstring = " ".join(ast.get_docstring(ast.parse(_source(name).read_text())).split())
            text = docstring.split(". ")[0].rstrip(".")
            rows.append(f"| {number} | `{name}` | {text} |")
            number = ""
    return "\n".join(rows)


def _source(name: str) -> Path | None:
    files = [JVGEN / name / "__init__.py", JVGEN / f"{name}.py"]
    return next((file for file in files if file.is_file()), None)
