"""What a checkpoint says about the run that wrote it, and whether another run may resume from it."""

import json
import re
from collections.abc import Callable
from typing import Any

from jvgen import config, saved_config
from jvgen.config import ConfigError
from jvgen.tasks.task import Task
from jvgen.training.experiment import Experiment
from jvgen.versions import git_commit, package_versions

# Parts of an experiment that decide what the parameters and the batches are; everything else may change at a resume.
RESUME_CRITICAL = ("seed", "task", "data.sources", "data.buckets", "data.kind_weights", "data.resize", "data.flip")
MAX_LISTED = 40
FROZEN = "frozen weights"
PICKLES_HINT = (
    "\nOf a folder of .bin files, 0.1.0 took the digest of config.json alone: of a run that it started with such "
    "weights this difference says nothing."
)


def run_document(experiment: Experiment, task: Task) -> dict[str, Any]:
    """The resolved config, package versions, git commit and frozen weights' digest, for a checkpoint."""
    return {
        "experiment": json.loads(saved_config.to_json(experiment)),
        "packages": package_versions(),
        "git": git_commit(),
        "frozen": task.frozen_digest(),
    }


def experiment_of(document: dict[str, Any]) -> Experiment:
    """The experiment that a run document describes.

    Raises:
      ConfigError: it names a class that this version does not have.
    """
    return saved_config.decode(document["experiment"])


def check_same_run(
    saved: dict[str, Any], current: dict[str, Any], accepted: tuple[str, ...], log: Callable[[str], None]
) -> None:
    """Compare the run that wrote a checkpoint with the one that resumes from it.

    The saved config is read by today's classes first, so a field that it lacks counts as its default. Differences that
    do not bind (learning rate, steps, dtype ...) and accepted ones are logged.

    Args:
      saved, current: run documents.
      accepted: regular expressions of dotted paths that may differ.
      log: takes the list of allowed differences as text.

    Raises:
      ConfigError: lists every difference in model, data or seed; or the saved config cannot be read.
    """
    try:
        before, now = _fields(saved), _fields(current)
    except ConfigError as error:
        if ".*" not in accepted:
            raise
        log(f"WARNING: the checkpoint's config cannot be compared with this run's: {error}")
        return
    allowed, refused, hint = [], [], ""
    for path in sorted(before.keys() | now.keys()):
        if before.get(path) == now.get(path):
            continue
        line = f"  {path}: checkpoint {before.get(path, 'has none')}, now {now.get(path, 'none')}"
        free = not _is_critical(path) or any(re.match(pattern, path) for pattern in accepted)
        (allowed if free else refused).append(line)
        if path == FROZEN and not free:
            hint = PICKLES_HINT
    if refused:
        raise ConfigError(
            "the checkpoints in this run directory are of another model or data set:\n"
            + _listed(refused)
            + hint
            + "\nRestore these settings, or use another run directory; to resume anyway, pass --allow-changes or, "
            "unless batches change, list the paths in checkpoint.accept_changes."
        )
    if allowed:
        log("settings that differ from the checkpoint's:\n" + _listed(allowed))


def _fields(document: dict[str, Any]) -> dict[str, str]:
    fields = dict(config.leaves(experiment_of(document)))
    return fields | ({FROZEN: document["frozen"]} if document.get("frozen") else {})


def _is_critical(path: str) -> bool:
    parts = (*RESUME_CRITICAL, FROZEN)
    return any(path == part or path.startswith(f"{part}.") for part in parts)


def _listed(lines: list[str]) -> str:
    more = f"\n  and {len(lines) - MAX_LISTED} more" if len(lines) > MAX_LISTED else ""
    return "\n".join(lines[:MAX_LISTED]) + more
