"""Every notebook runs from top to bottom without a trained run, and its file is small."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import quick_xla

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
# In a process of its own, with one device, as users have it: training on eight takes three times as long.
CELLS = """
import json, sys, warnings
from pathlib import Path

warnings.simplefilter("error")
path = Path(sys.argv[1])
cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
names = {"__name__": "__main__"}
for number, cell in enumerate(cells):
    exec(compile("".join(cell["source"]), f"{path.name} cell {number}", "exec"), names)
"""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    # Runs on this machine are not used: a notebook prints what it needs, and skips those cells.
    environment = os.environ | {"JVGEN_RUN": str(tmp_path / "nowhere"), "XLA_FLAGS": quick_xla.flags()}
    done = subprocess.run(
        [sys.executable, "-c", CELLS, path.name],
        cwd=path.parent,
        env=environment | {"MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert path.stat().st_size < 300_000, "clear large outputs before committing a notebook"
