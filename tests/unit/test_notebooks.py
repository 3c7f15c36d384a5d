"""Every notebook runs from top to bottom without a trained run, and its file is small."""

import contextlib
import io
import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(path.parent)
    # Runs on this machine are not used: a notebook prints what it needs, and skips those cells.
    monkeypatch.setenv("JVGEN_RUN", str(tmp_path / "nowhere"))
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    names, printed = {"__name__": "__main__"}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        for number, cell in enumerate(cells):
            exec(compile("".join(cell["source"]), f"{path.name} cell {number}", "exec"), names)
    assert cells and printed.getvalue()
    assert path.stat().st_size < 300_000, "clear large outputs before committing a notebook"
