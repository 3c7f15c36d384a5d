"""What a checkpoint says about the run that wrote it, and whether another run may go on from it."""

import json
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from jvgen import config
from jvgen.config import ConfigError
from jvgen.tasks.task import Task
from jvgen.training.experiment import Experiment

PACKAGES = ("jvgen", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
# The parts of an experiment that decide what the parameters and the batches are; the rest may change at a resume.
BINDING = ("seed", "task", "data.sources", "data.buckets", "data.kind_weights", "data.resize", "data.flip")


def run_document(experiment: Experiment, task: Task) -> dict[str, Any]:
    """The resolved config, package versions, git commit and frozen weights' digest, for a checkpoint."""
    return {
        "experiment": json.loads(config.to_json(experiment)),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "git": git_commit(),
        "frozen": task.frozen_digest(),
    }


def experiment_of(document: dict[str, Any]) -> Experiment:
    """The experiment that a run document describes."""
    return config.from_json(json.dumps(document["experiment"]))


def git_commit() -> str:
    """Commit of the checkout that this package is imported from, "+" appended if it has changes; "" outside of one."""
    folder = Path(__file__).parent
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()


def check_same_run(saved: dict[str, Any], current: dict[str, Any], accepted: tuple[str, ...]) -> None:
    """Raise `ConfigError` listing every difference in model, data or seed between a checkpoint and this run.

    Args:
      saved, current: run documents.
      accepted: regular expressions of dotted paths that may differ.
    """
    before, now = _binding(saved), _binding(current)
    differences = [
        f"  {path}: checkpoint {before.get(path, 'has none')}, now {now.get(path, 'none')}"
        for path in sorted(before.keys() | now.keys())
        if before.get(path) != now.get(path) and not any(re.match(pattern, path) for pattern in accepted)
    ]
    if differences:
        raise ConfigError(
            "the checkpoints in this work folder are of another model or data set:\n"
            + "\n".join(differences[:40])
            + (f"\n  and {len(differences) - 40} more" if len(differences) > 40 else "")
            + "\nRestore these settings, or take another work folder; to go on in spite of it, say --allow-changes or "
            "name the paths in checkpoint.accept_changes."
        )


def _binding(document: dict[str, Any]) -> dict[str, str]:
    leaves = _leaves(document["experiment"], "")
    chosen = {
        path: value
        for path, value in leaves.items()
        if any(path == part or path.startswith(f"{part}.") for part in BINDING)
    }
    return chosen | ({"frozen weights": document["frozen"]} if document.get("frozen") else {})


def _leaves(node: Any, path: str) -> dict[str, str]:
    """Dotted path -> printed value. Works on the saved JSON itself: its classes may be gone by now."""
    if isinstance(node, dict):
        # A dict of a config is saved under this name; a field may have it too.
        inner = node.get("mapping")
        items = list((inner if isinstance(inner, dict) else node).items())
    elif isinstance(node, list) and any(isinstance(item, (dict, list)) for item in node):
        items = [(str(index), item) for index, item in enumerate(node)]
    else:
        return {path: repr(node)}
    found: dict[str, str] = {}
    for key, item in items:
        found |= _leaves(item, f"{path}.{key}".lstrip("."))
    return found
