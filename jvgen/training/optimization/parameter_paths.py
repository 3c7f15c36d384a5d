"""Patterns over parameter paths ("denoiser/blocks/kernel"), and names for the leaves of a whole training state."""

import re
from collections.abc import Sequence
from typing import Any

import jax

from jvgen.nested import Tree, flatten


def matches(patterns: str | Sequence[str], path: str) -> bool:
    """Whether one of the regular expressions matches the path from its start (`re.match`)."""
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    return any(re.match(pattern, path) for pattern in patterns)


def unmatched(patterns: Sequence[str], tree: Tree) -> list[str]:
    """The patterns that match no path of the tree, most likely misspelled."""
    return [pattern for pattern in patterns if not any(matches(pattern, path) for path in flatten(tree))]


def name_leaves(tree: Any) -> dict[str, Any]:
    """A flat dict of any tree of registered containers: "optimizer/model/adam/mu/denoiser/kernel" -> leaf."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(_part(entry) for entry in path): leaf for path, leaf in leaves}


def _part(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    raise AssertionError(f"unknown kind of tree path entry {entry!r}")
