"""What is used of JAX's private modules exists in this release, and is used in one place."""

import re
from pathlib import Path

import pytest

import jvgen
from jvgen.parallel import jax_internals

PACKAGES = "jax|jaxlib|flax|nnx|orbax|ocp|grain|optax"
PRIVATE = re.compile(rf"(from|import) ({PACKAGES})[\w.]*\._|\b({PACKAGES})(\.\w+)*\._[a-z]")


def test_private_modules_are_used_in_one_file():
    found = {
        path.name
        for path in Path(jvgen.__file__).parent.rglob("*.py")
        if any(PRIVATE.search(line.split("#")[0]) for line in path.read_text().splitlines())
    }
    assert found == {"jax_internals.py"}


def test_this_release_has_what_is_used():
    jax_internals.check_distributed_state()
    state = jax_internals.distributed_state()
    assert state.client is None or state.num_processes >= 1
    for name in jax_internals._CLUSTERS:
        detected = jax_internals.cluster(name)
        for method in ("is_env_present", "get_coordinator_address", "get_process_count", "get_process_id"):
            assert callable(getattr(detected, method))


def test_what_a_release_moved_is_named(monkeypatch):
    monkeypatch.setitem(jax_internals._CLUSTERS, "SlurmCluster", "moved")
    with pytest.raises(RuntimeError, match=r"has no jax._src.clusters.moved.SlurmCluster.*docs/versions.md"):
        jax_internals.cluster("SlurmCluster")
    monkeypatch.setattr(jax_internals, "_internal", lambda module, name: object())
    with pytest.raises(RuntimeError, match="has no jax._src.distributed.global_state.client"):
        jax_internals.check_distributed_state()
