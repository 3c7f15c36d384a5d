"""The version and commit that `jvgen --version` prints, and that every file says the same version."""

import tomllib
from pathlib import Path

import jvgen
from jvgen import versions

ROOT = Path(__file__).parents[2]


def test_every_file_has_the_same_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == jvgen.__version__
    released = jvgen.__version__.partition(".dev")[0]
    assert "dev" in jvgen.__version__ or f"\nversion: {released}\n" in (ROOT / "CITATION.cff").read_text()


def test_an_installed_wheel_says_the_commit_that_it_was_built_from(tmp_path, monkeypatch):
    (tmp_path / "jvgen").mkdir()
    monkeypatch.setattr(versions, "_PACKAGE", tmp_path / "jvgen")
    assert versions.git_commit() == ""
    (tmp_path / "jvgen" / "commit.txt").write_text("0123abc\n")
    assert versions.git_commit() == "0123abc"
    (tmp_path / ".git").mkdir()  # a checkout that git cannot read
    assert versions.git_commit() == ""
