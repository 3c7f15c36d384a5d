"""The configs that rows of the table were compiled from, beside what the files in `configs/` say now.

`compiled_configs/NAME.json` has the config of a run as it was compiled last, and a row the digest of that file. A
digest alone would call every row changed once a class gets a field; the file is read as a checkpoint's config is, with
the defaults under which older runs stay what they were.
"""

import hashlib
from pathlib import Path
from typing import Any

from jvgen import config, saved_config
from jvgen.config import ConfigError
from jvgen.training.experiment import Experiment
from tests.pods.runs import PodRun

FOLDER = Path(__file__).with_name("compiled_configs")
# What a compiled step depends on. Others are read by the host only: data, seed, checkpoints.
FIELDS = ("task", "data.buckets", "training", "optimizer", "optimizers", "ema", "mesh", "sharding")
# Fields of a page's cell at most.
SHOWN = 3


def record(run: PodRun) -> str:
    """Write the config of a run as it is now; the digest of it, for its rows."""
    FOLDER.mkdir(exist_ok=True)
    text = saved_config.to_json(run.experiment()) + "\n"
    _file(run).write_text(text)
    return _digest(text)


def since(run: PodRun, row: dict[str, Any]) -> str:
    """What of a run's config changed since a row of it was compiled, in words; empty for nothing."""
    if "config" not in row:
        # It is older than this record: nobody knows which config it is of.
        return "; its config is not known"
    text = _file(run).read_text()
    if _digest(text) != row["config"]:
        return "; config changed since"
    try:
        before = _fields(saved_config.from_json(text))
    except ConfigError:
        return "; config changed since"
    now = _fields(run.experiment())
    changed = [path for path in {**before, **now} if before.get(path) != now.get(path)]
    if not changed:
        return ""
    shown = ", ".join(f"`{path}` {before.get(path, 'none')} -> {now.get(path, 'none')}" for path in changed[:SHOWN])
    return f"; config changed since: {shown}" + (f" and {len(changed) - SHOWN} more" if changed[SHOWN:] else "")


def _fields(experiment: Experiment) -> dict[str, str]:
    return {path: value for path, value in config.leaves(experiment) if path.startswith(FIELDS)}


def _file(run: PodRun) -> Path:
    return FOLDER / f"{run.name}.json"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
