"""Which Python `make` takes, with which versions, and that the two files of versions say what pyproject.toml allows."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
BROKEN = "#!/bin/sh\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n"
OLD = "#!/bin/sh\nexit 1\n"


def python(version: str) -> str:
    """A program that answers as a Python of this version that is new enough."""
    return f"#!/bin/sh\necho {version}\n"


def on_path(folder: Path, programs: dict[str, str]) -> dict[str, str]:
    """An environment whose PATH has these programs, by "FOLDER/NAME", and what the script itself needs."""
    for name, text in programs.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    shell = folder / "shell"
    shell.mkdir()
    (shell / "sh").symlink_to(shutil.which("sh"))
    folders = [str(folder / name) for name in ("first", "second", "shell")]
    return {"PATH": os.pathsep.join(folders), "HOME": str(folder), "PYENV_ROOT": str(folder / "pyenv")}


@pytest.mark.parametrize(
    "argument, programs, expected",
    [
        ("", {"first/python3.13": python("3.13.1"), "second/python3.11": python("3.11.9")}, "3.11.9 second/python3.11"),
        ("", {"first/python3.11": BROKEN, "second/python3.11": python("3.11.2")}, "3.11.2 second/python3.11"),
        ("", {"first/python3.12": BROKEN, "first/python3": python("3.15.0")}, "3.15.0 first/python3"),
        ("", {"first/python3.11": OLD, "first/python": python("3.12.0")}, "3.12.0 first/python"),
        ("python3.12", {"first/python3.12": BROKEN, "pyenv/versions/3.12.1/bin/python3.12": python("3.12.1")},
         "3.12.1 pyenv/versions/3.12.1/bin/python3.12"),
        ("python3.14", {"first/python3.11": python("3.11.9")}, "PYTHON=python3.14 does not run"),
        ("--latest", {"first/python3.12": python("3.12.4"), "first/python3.13": python("3.13.0")},
         "3.13.0 first/python3.13"),
        ("", {"first/python3.12": BROKEN, "first/python3": OLD}, "no Python 3.11 or newer"),
        ("--latest", {"first/python3": OLD}, "no Python 3.12 or newer"),
    ],
)  # fmt: skip
def test_the_python_that_runs_is_found(tmp_path, argument, programs, expected):
    command = [ROOT / ".ci" / "find_python", *argument.split()]
    done = subprocess.run(command, env=on_path(tmp_path, programs), capture_output=True, text=True)
    found = done.returncode == 0
    assert found == expected.startswith("3.")
    if found:
        assert done.stdout.strip().replace(f"{tmp_path}/", "") == expected and not done.stderr
    else:
        assert expected in done.stderr and not done.stdout


def test_a_real_python_says_its_version(tmp_path):
    """The fakes above do not run the check that real ones run."""
    done = subprocess.run([ROOT / ".ci" / "find_python", sys.executable], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [".".join(map(str, sys.version_info[:3])), sys.executable]
    (tmp_path / "python3").symlink_to(sys.executable)
    latest = subprocess.run(
        [ROOT / ".ci" / "find_python", "--latest"],
        env={"PATH": f"{tmp_path}:{os.path.dirname(shutil.which('sh'))}", "PYENV_ROOT": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    if sys.version_info >= (3, 12):
        assert latest.returncode == 0 and latest.stdout
    elif latest.returncode == 0:  # another one, on the path of sh
        assert not latest.stdout.startswith("3.11")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    "version, constraints, folder",
    [("3.11.9", "constraints.txt", ".venv"), ("3.13.1", "constraints-latest.txt", ".venv-3.13")],
)
def test_versions_and_environment_follow_the_python(tmp_path, version, constraints, folder):
    fake = tmp_path / "python"
    fake.write_text(python(version))
    fake.chmod(0o755)
    command = ["make", "--dry-run", "--always-make", "setup-test", f"PYTHON={fake}"]
    # Under `make test` the variables of that make would reach this one.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
    first, *rest = done.stdout.splitlines()
    assert first == f"jvgen: Python {version} ({fake}), {constraints}, {folder}"
    assert f"{fake} -m venv {folder}" in rest
    assert all(f"-c {constraints} " in line for line in rest if "pip install" in line)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_world_demo_is_set_up_with_the_environments_that_it_plans_in():
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--dry-run", "--always-make", "demo-world"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment).stdout
    assert shown.index("pip install") < shown.index('-e ".[control]"') < shown.index("jvgen demo world")


@pytest.mark.parametrize("file, python", [("constraints.txt", "3.11"), ("constraints-latest.txt", "3.13")])
def test_constraints_fit_the_requirements(file, python):
    pins = dict(line.split("==") for line in (ROOT / file).read_text().splitlines() if "==" in line)
    pins = {re.sub("[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    texts = project["dependencies"] + [text for name in ("test", "torch", "tpu", "gpu") for text in extras[name]]
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    checked = set()
    for requirement in map(Requirement, texts):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            name = re.sub("[-_.]+", "-", requirement.name).lower()
            assert name in pins, f"{file} has no version of {name}"
            assert requirement.specifier.contains(pins[name]), f"{file}: {name}=={pins[name]} is not {requirement}"
            checked.add(name)
    assert {"jax", "flax", "orbax-checkpoint", "torch", "libtpu"} <= checked


def test_every_target_has_one_recipe():
    """Of two recipes of one name make takes the second, with a warning: `make test` once ran a part of the tests."""
    text = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z][a-z-]*):", text, re.MULTILINE)
    assert sorted(targets) == sorted(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split())
