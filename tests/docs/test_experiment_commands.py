"""Commands of experiments in code blocks of the documents are complete: no unknown option, none that lacks."""

import argparse
import importlib
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
START = "python -m tests.experiments."


def documented() -> list[tuple[str, str]]:
    """(file, command) of every line of a document that is such a command; words before it are environment variables."""
    found = []
    for file in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("jvgen/**/*.md")):
        for line in file.read_text().replace("\\\n", " ").splitlines():
            before, start, rest = line.partition(" #")[0].partition(START)
            if start and all("=" in word for word in before.split()) and "..." not in rest:
                found.append((str(file.relative_to(ROOT)), start + rest))
    return found


class Parsed(Exception):
    """Arguments fit."""


@pytest.mark.parametrize(("file", "command"), documented())
def test_commands_of_experiments_are_complete(file, command, monkeypatch):
    _, _, module, *words = shlex.split(command)
    parse = argparse.ArgumentParser.parse_args

    def only_parse(parser, given=None, namespace=None):
        parse(parser, words, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    monkeypatch.setattr("sys.argv", [module, *words])
    with pytest.raises(Parsed):
        importlib.import_module(module).main()
