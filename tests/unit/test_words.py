"""The project's words are the field's: a short list of what is not written in code, messages and documents."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("jvgen", "configs", "docs", "notebooks", "tests")
ENDINGS = {".py", ".md", ".toml", ".ipynb", ".html", ".j2"}

UNITS = "step|frame|channel|slot|clip|device"
NOUNS = f"{UNITS}|row|line|run|file|network|view|parameter|layer|process|host"
BRITISH = (
    "synchroni|normali|regulari|initiali|optimi|quanti|vectori|orthogonali|seriali|utili|tokeni|visuali|minimi|maximi|"
    "generali|randomi|summari|paralleli"
)
# Pattern -> what to write instead.
BANNED = {
    r"stands? still": "frozen, is not trained",
    r"newest sound|\bsound (one|checkpoint)s?\b": "latest valid checkpoint",
    r"\bset aside\b": "quarantined, moved to corrupt/",
    r"\bfront doors?\b": "dispatcher",
    r"\bwork folder\b": "run directory",
    r"\b(MOST|LEAST)_[A-Z]": "MAX_, MIN_",
    r"\bplayers?\b": "objective",
    r"\bat rest\b": "inactive",
    r"\bfor whoever\b|\bbehind one face\b|\bput to use\b|\bpassed over\b|\bof (its|their) own accord\b": "plain words",
    r"\b(goes|go|going|went) on from\b": "resumes from, continues from",
    r"\b(begin|begins|began|begun) (anew|again)\b": "restart",
    r"\blikewise\b": "the same as ..., also",
    rf"\b(TFLOP|GFLOP|MiB|GiB|s) an? ({UNITS})\b": "TFLOP/device/step, s/clip",
    rf"\bone an? ({NOUNS})\b": "one per ...",
    rf"\b(an?|each) ({UNITS}) and ({UNITS})\b(?! each)": "per device and step",
    r"\(default: None\)": "say what the absence means",
    r"\b(rooms?|floors?|cellar|corridor) of the house\b|\bfloors? below\b|\bthe house\b": "packages, layers",
    r"(?i)\banalys(e|es|ed|ing|er)\b": "analyze",
    rf"(?i)\b\w*({BRITISH})s(e|es|ed|er|ers|ing|ation|ations)\b": "z: US spelling",
    r"(?i)\b(colours?|neighbours?|neighbouring|behaviours?|favourites?|honours?)\b": "US spelling",
    r"(?i)\b(centre|centres|centred|metres?|licence|licences|grey)\b": "US spelling",
}
# Files that name such words for a reason.
EXEMPT = {"tests/unit/test_words.py", "CHANGELOG.md"}


def files() -> list[Path]:
    found = [path for name in FOLDERS for path in (ROOT / name).rglob("*")]
    found += [path for path in ROOT.glob("*") if path.suffix in ENDINGS or path.name == "Makefile"]
    kept = [path for path in found if path.is_file() and (path.suffix in ENDINGS or path.name == "Makefile")]
    return sorted(
        path for path in kept if str(path.relative_to(ROOT)) not in EXEMPT and "golden/cases" not in str(path)
    )


def prose(path: Path) -> str:
    """Text of a file; of a notebook, without its outputs' pictures."""
    text = path.read_text()
    return re.sub(r'"image/(png|jpeg)": "[^"]*"', "", text) if path.suffix == ".ipynb" else text


@pytest.fixture(scope="module")
def texts() -> dict[Path, str]:
    return {path.relative_to(ROOT): prose(path) for path in files()}


@pytest.mark.parametrize("pattern", BANNED)
def test_no_banned_words(texts, pattern):
    found = []
    for path, text in texts.items():
        for match in re.finditer(pattern, text):
            found.append(f"{path}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]!r}")
    assert not found, f"write {BANNED[pattern]}:\n" + "\n".join(found)
