"""The files in `launch/` are what `jvgen launch` makes today."""

import os
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from commands import FOLDER, ROOT, launch_file  # noqa: E402

from jvgen.cli import launch as command  # noqa: E402
from jvgen.launch.targets import TARGETS  # noqa: E402


def test_every_target_is_offered_and_has_a_file():
    assert tuple(TARGETS) == command.TARGETS
    by_hand = {"README.md", "Dockerfile"}
    assert {path.name for path in FOLDER.iterdir()} - by_hand == {target.file for target in TARGETS.values()}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_a_file_is_what_its_command_makes(target):
    """JVGEN_UPDATE_DOCS=1 writes the files."""
    file = FOLDER / target.file
    arguments = re.search("^# Made by: jvgen launch (.+)$", file.read_text(), re.MULTILINE)[1]
    assert arguments.startswith(f"{target.name} ")
    text = launch_file(arguments)
    if os.environ.get("JVGEN_UPDATE_DOCS"):
        file.write_text(text)
    assert file.read_text() == text, "run JVGEN_UPDATE_DOCS=1 pytest tests/launch/test_files.py, commit launch/"


def test_the_readme_names_every_file_and_option():
    text = (FOLDER / "README.md").read_text()
    missing = [target.file for target in TARGETS.values() if f"`{target.file}`" not in text]
    missing += [target.name for target in TARGETS.values() if f"`{target.name}`" not in text]
    assert not missing


def test_the_image_gets_what_it_copies():
    """.dockerignore excludes everything but what the Dockerfile copies from the repository."""
    ignored = (ROOT / ".dockerignore").read_text().split()
    copied = [word for line in (FOLDER / "Dockerfile").read_text().splitlines() if line.startswith("COPY ")
              for word in line.split()[1:-1]]  # fmt: skip
    assert ignored[ignored.index("*") - 1] and {f"!{name}" for name in copied} <= set(ignored)
    assert all((ROOT / name).exists() for name in copied)
