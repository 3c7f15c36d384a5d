"""Nested dicts by path ("denoiser/blocks/kernel"): flatten, unflatten, map, split, select, merge."""

from collections.abc import Callable, Mapping
from typing import Any

Tree = Mapping[str, Any]


def flatten(tree: Tree, prefix: str = "", separator: str = "/") -> dict[str, Any]:
    """Leaves of a nested dict by path, keys sorted at every level. Anything that is not a mapping is a leaf."""
    leaves: dict[str, Any] = {}
    for key in sorted(tree):
        path = f"{prefix}{separator}{key}" if prefix else str(key)
        if isinstance(tree[key], Mapping):
            leaves |= flatten(tree[key], path, separator)
        else:
            leaves[path] = tree[key]
    return leaves


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict with these leaves at these paths."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[name] = leaf
    return tree


def map_with_path(function: Callable[[str, Any], Any], tree: Tree) -> dict[str, Any]:
    """Apply `function(path, leaf)` to every leaf."""
    return unflatten({path: function(path, leaf) for path, leaf in flatten(tree).items()})


def split(tree: Tree, keep: Callable[[str], bool]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The leaves whose path `keep` accepts, and the others, each as a nested dict without empty branches."""
    chosen: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for path, leaf in flatten(tree).items():
        (chosen if keep(path) else others)[path] = leaf
    return unflatten(chosen), unflatten(others)


def select(tree: Tree, like: Tree) -> dict[str, Any]:
    """The leaves of `tree` at the paths of `like`."""
    leaves = flatten(tree)
    return unflatten({path: leaves[path] for path in flatten(like)})


def merge(base: Tree, changes: Tree) -> dict[str, Any]:
    """`base` with the leaves of `changes` added or replacing its own."""
    return unflatten(flatten(base) | flatten(changes))
