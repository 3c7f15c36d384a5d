"""Nested dicts of parameters by path ("denoiser/blocks/kernel"): flatten, select, split, merge, match patterns."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

Tree = dict[str, Any]


def flatten(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Paths and leaves of a nested dict, in key order. Anything that is not a dict is a leaf."""
    for key in sorted(tree):
        path = f"{prefix}/{key}" if prefix else key
        if isinstance(tree[key], dict):
            yield from flatten(tree[key], path)
        else:
            yield path, tree[key]


def unflatten(leaves: dict[str, Any]) -> Tree:
    """The nested dict with these paths and leaves."""
    tree: Tree = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[name] = leaf
    return tree


def map_with_path(function: Callable[[str, Any], Any], tree: Tree) -> Tree:
    """Apply `function(path, leaf)` to every leaf of a nested dict."""
    return unflatten({path: function(path, leaf) for path, leaf in flatten(tree)})


def split(tree: Tree, keep: Callable[[str], bool]) -> tuple[Tree, Tree]:
    """The leaves whose path `keep` accepts, and the others, each as a nested dict without empty branches."""
    chosen, others = {}, {}
    for path, leaf in flatten(tree):
        (chosen if keep(path) else others)[path] = leaf
    return unflatten(chosen), unflatten(others)


def select(tree: Tree, like: Tree) -> Tree:
    """The leaves of `tree` at the paths that `like` has."""
    leaves = dict(flatten(tree))
    return unflatten({path: leaves[path] for path, _ in flatten(like)})


def merge(base: Tree, changes: Tree) -> Tree:
    """`base` with the leaves of `changes` added or put in their place."""
    return unflatten(dict(flatten(base)) | dict(flatten(changes)))


def matches(patterns: str | Sequence[str], path: str) -> bool:
    """Whether one of the regular expressions matches the path from its start (as `re.match` has it)."""
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    return any(re.match(pattern, path) for pattern in patterns)


def unmatched(patterns: Sequence[str], tree: Tree) -> list[str]:
    """The patterns that match no path of the tree: most likely misspelled."""
    paths = [path for path, _ in flatten(tree)]
    return [pattern for pattern in patterns if not any(matches(pattern, path) for path in paths)]


def name_leaves(tree: Any) -> dict[str, Any]:
    """A flat dict of any tree of registered containers: "optimizer/model/adam/mu/denoiser/kernel" -> leaf."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(_part(entry) for entry in path): leaf for path, leaf in leaves}


def _part(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    raise AssertionError(f"unknown kind of tree path entry {entry!r}")
