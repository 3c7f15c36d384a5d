"""Numbers made by the papers' own code: every case that a runner serves, here and in the folders of JVGEN_GOLDEN.

A case is a folder with `config.json`, `io.safetensors` and, for networks, `weights.safetensors` in the original names.
Cases are collected from `tests/golden/cases` and from every folder named in the environment variable JVGEN_GOLDEN
(separated as PATH is). A runner is a module in `tests/golden/runners` with two functions:

    serves(name, config) -> bool    is this case about the runner's system? `name` is that of the folder
    run(case) -> None               compute and compare; `case` is the `Case` below

What no runner serves is not collected. Runners take names, sizes and flags from the case, since other folders hold
others; a field of config.json that a runner does not know is an error (`case_fields`). Networks are compared within
what rounding does to the case at hand (`rounding`).
"""

import dataclasses
import functools
import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import rounding  # noqa: E402
from case_fields import check_fields  # noqa: E402

from jvgen.interop.safetensors_file import SafetensorsFile  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Case:
    """One folder of numbers; tensors are read when they are asked for."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())

    @functools.cached_property
    def weights(self) -> Mapping[str, np.ndarray]:
        return SafetensorsFile(self.folder / "weights.safetensors")

    @functools.cached_property
    def io(self) -> Mapping[str, np.ndarray]:
        return SafetensorsFile(self.folder / "io.safetensors")


def load_runners(folder: Path) -> list[ModuleType]:
    runners = []
    for path in sorted(folder.glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"golden_runner_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        runners.append(module)
    return runners


def find_cases(roots: list[Path]) -> list[Case]:
    for root in roots:
        if not root.is_dir():
            raise ValueError(f"JVGEN_GOLDEN names {root}, which is not a folder.")
    return [Case(path.parent) for root in roots for path in sorted(root.glob("*/config.json"))]


def served(cases: list[Case], runners: list[ModuleType]) -> list[tuple[Case, ModuleType]]:
    pairs = []
    for case in cases:
        takers = [runner for runner in runners if runner.serves(case.name, case.config)]
        assert len(takers) <= 1, f"{case.folder} is served by {[runner.__name__ for runner in takers]}"
        pairs += [(case, runner) for runner in takers]
    return pairs


ROOTS = [HERE / "cases", *(Path(root) for root in os.environ.get("JVGEN_GOLDEN", "").split(os.pathsep) if root)]
RUNNERS = load_runners(HERE / "runners")
SERVED = served(find_cases(ROOTS), RUNNERS)
NAMES = [f"{case.folder.parent.name}/{case.name}" for case, _ in SERVED]


@pytest.mark.parametrize(("case", "runner"), SERVED, ids=NAMES)
def test_case(case, runner):
    runner.run(case)


ONE_PER_RUNNER = {runner: case for case, runner in reversed(SERVED)}


@pytest.mark.parametrize("runner", ONE_PER_RUNNER, ids=lambda runner: runner.__name__)
def test_a_field_that_a_runner_does_not_know_is_an_error_that_names_it(runner):
    case = Case(ONE_PER_RUNNER[runner].folder)
    case.__dict__["config"] = case.config | {"unheard_of": 2, "remark": "remarks are for readers"}
    with pytest.raises(ValueError, match=r"unheard_of = 2: the runner does not know this field"):
        runner.run(case)


def test_fields_with_one_supported_value():
    check_fields({"depth": 3, "kind": "plain", "seed": 1}, "made", read=("depth",), fixed={"kind": "plain"})
    with pytest.raises(ValueError, match=r"made.kind = 'odd': only 'plain' is supported"):
        check_fields({"kind": "odd"}, "made", fixed={"kind": "plain"})


def test_bounds_follow_the_conditioning_of_what_is_compared():
    """Near its pole 1 / (1 - x) is ill-conditioned: rounding of x explains more there, but no wrong constant."""
    x = np.float32(1 - 2.0**-12)
    results, moves = rounding.measured(lambda x: 1 / (1 - x), x)
    assert 2**10 < moves / (rounding.EPSILON * results) < 2**14
    rounding.within_rounding(results + moves, results, moves, "near the pole")
    with pytest.raises(AssertionError, match="wrong: off by .*, rounding explains"):
        rounding.within_rounding(results * 1.01, results, moves, "wrong")


def test_every_case_kept_here_is_served():
    kept = {path.parent.name for path in (HERE / "cases").glob("*/config.json")}
    assert kept == {case.name for case, _ in SERVED if case.folder.parent == HERE / "cases"}
    assert sum(path.stat().st_size for path in (HERE / "cases").rglob("*") if path.is_file()) < 20e6


def test_other_folders_are_collected_and_unknown_systems_are_not(tmp_path):
    known, unknown = tmp_path / "seeds" / SERVED[0][0].name, tmp_path / "seeds" / "unheard_of"
    for folder in (known, unknown):
        folder.mkdir(parents=True)
    (known / "config.json").write_text(json.dumps(SERVED[0][0].config))
    (unknown / "config.json").write_text("{}")
    assert [case.folder for case, _ in served(find_cases([tmp_path / "seeds"]), RUNNERS)] == [known]
    with pytest.raises(ValueError, match="JVGEN_GOLDEN names .*nowhere, which is not a folder"):
        find_cases([tmp_path / "nowhere"])
