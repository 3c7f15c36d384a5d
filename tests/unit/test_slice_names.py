"""Slices in texts: chips beside the topology, and Google's names, which count TensorCores on v4 and v5p."""

import re
from pathlib import Path

import pytest

from jvgen.parallel.pods import pod_named, slice_of

ROOT = Path(__file__).parents[2]
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "configs").glob("*.py"))]
TEXTS += sorted((ROOT / "jvgen").rglob("*.md")) + sorted((ROOT / "jvgen").rglob("*.py"))
_SHAPE = r"(?:v4|v5e|v5p|v6e|tpu7x):\d+x\d+(?:x\d+)?"
# "128 of v5p (`v5p:4x4x8`)", "64 chips of v5p (`--topology v5p:4x4x4`)".
COUNTED = re.compile(rf"(\d+) (?:chips )?of (?:v4|v5e|v5p|v6e|tpu7x) \(`(?:--topology )?({_SHAPE})`")
NAMED = re.compile(r"\b(?:v4|v5p|v6e|v5litepod)-\d+\b")


def problems(text: str) -> list[str]:
    """Counts of chips that are not those of the topology beside them, and names without their topology in the line."""
    found = [
        f"{count} chips, {shape}" for count, shape in COUNTED.findall(text) if pod_named(shape).chips != int(count)
    ]
    for line in text.splitlines():
        if "TPU_ACCELERATOR_TYPE" in line:  # what libtpu is told on a machine without a TPU
            continue
        names = {
            re.search(NAMED, slice_of(shape)).group() for shape in re.findall(_SHAPE, line) if "tpu7x" not in shape
        }
        found += [f"{name} without its topology" for name in NAMED.findall(line) if name not in names]
    return found


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_slices_are_called_by_their_topology_and_chips(path):
    assert not problems(path.read_text())


def test_what_is_found():
    assert problems("64 of v5p (`v5p:4x4x8`)") == ["64 chips, v5p:4x4x8"]
    assert problems("a v5p-128 slice (v5p:4x4x8)") == ["v5p-128 without its topology"]
    assert not problems("128 of v5p (`v5p:4x4x8`, v5p-256)") and not problems("256 chips of v6e (`v6e:16x16`)")


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_configs_for_pods_name_topologies(config):
    """Whoever trains on a pod orders what the config says: every line of chips has a topology."""
    chips = re.search(r"^Chips: (.*?)^(?:[A-Z]\w+:|\"\"\")", config.read_text(), re.MULTILINE | re.DOTALL)
    if chips is None:
        pytest.skip("trains on one machine")
    for generation in set(re.findall(r"\d+ of (v\w+|tpu7x)", chips.group(1))):
        assert re.search(rf"`(?:--topology )?{generation}:", chips.group(1)), f"no topology of {generation}"
