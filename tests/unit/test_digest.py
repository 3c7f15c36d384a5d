"""Digests: the same on every layout, different for every single flipped bit, and stable over time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jvgen.training.checkpoint import digest

DTYPES = ["float32", "bfloat16", "float16", "int32", "uint8", "bool"]


def make(dtype: str, shape=(8, 16), seed: int = 0) -> jax.Array:
    values = np.random.default_rng(seed).standard_normal(shape) * 50
    return jnp.asarray(values).astype(dtype) if dtype != "bool" else jnp.asarray(values > 0)


def test_stored_digests_stay_readable():
    """These values are in checkpoints: if the function has to change, so does `digest.VERSION`."""
    arrays = {
        "float32": jnp.arange(12, dtype=jnp.float32).reshape(3, 4),
        "bfloat16": jnp.arange(5, dtype=jnp.bfloat16),
        "int32": jnp.int32(7),
        "bool": jnp.array([True, False]),
    }
    assert digest.of_arrays(arrays) == EXPECTED


EXPECTED = {
    "float32": "a4e4c5e2650947ad",
    "bfloat16": "e0b296a82548c2f1",
    "int32": "2703de93fbe74d39",
    "bool": "e001efbefdf8492b",
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_layout_changes_it(dtype):
    value = make(dtype)
    expected = digest.of_arrays({"x": value})
    devices = np.array(jax.devices())
    for mesh, spec in [
        (Mesh(devices.reshape(8), ("a",)), PartitionSpec("a")),
        (Mesh(devices.reshape(8), ("a",)), PartitionSpec(None, "a")),
        (Mesh(devices.reshape(8), ("a",)), PartitionSpec()),
        (Mesh(devices.reshape(2, 4), ("a", "b")), PartitionSpec("b", "a")),
        (Mesh(devices[:4].reshape(2, 2), ("a", "b")), PartitionSpec("b")),
    ]:
        placed = jax.device_put(value, NamedSharding(mesh, spec))
        assert digest.of_arrays({"x": placed}) == expected, (mesh.shape, spec)


@settings(max_examples=60, deadline=None)
@given(bit=st.integers(0, 31), index=st.integers(0, 127), seed=st.integers(0, 5))
def test_every_flipped_bit_changes_it(bit, index, seed):
    words = np.random.default_rng(seed).integers(0, 2**32, 128, dtype=np.uint32)
    flipped = words.copy()
    flipped[index] ^= np.uint32(1 << bit)
    before, after = (digest.of_arrays({"x": jnp.asarray(w.view(np.int32))})["x"] for w in (words, flipped))
    # Either lane alone would notice.
    assert before[:8] != after[:8] and before[8:] != after[8:]


def test_negative_zero_and_payloads_of_nan_count():
    zero = digest.of_arrays({"x": jnp.array([0.0, 1.0])})
    assert digest.of_arrays({"x": jnp.array([-0.0, 1.0])}) != zero
    quiet, other = (np.array([bits], np.uint32).view(np.float32) for bits in (0x7FC00000, 0x7FC00001))
    assert digest.of_arrays({"x": jnp.asarray(quiet)}) != digest.of_arrays({"x": jnp.asarray(other)})


def test_order_counts():
    x = make("float32", (64,))
    swapped = x.at[3].set(x[40]).at[40].set(x[3])
    assert digest.of_arrays({"x": x}) != digest.of_arrays({"x": swapped})
    assert digest.of_arrays({"x": x}) != digest.of_arrays({"x": jnp.roll(x, 1)})
    assert digest.of_arrays({"x": jnp.zeros((4,))}) != digest.of_arrays({"x": jnp.zeros((5,))})


def test_no_two_of_many_arrays_share_it():
    rng = np.random.default_rng(0)
    found = [digest.of_arrays({"x": jnp.asarray(rng.integers(0, 2, 64), jnp.int32)})["x"] for _ in range(300)]
    assert len(set(found)) == len(found)
    assert len({value[:8] for value in found}) == len(found) and len({value[8:] for value in found}) == len(found)


def test_a_manifest_names_what_is_corrupt():
    arrays = {"a/kernel": make("float32"), "b/kernel": make("float32", seed=1), "step": jnp.int32(3)}
    documents = {"data": {"step": 3}, "run": {"name": "x"}}
    saved = digest.manifest(arrays, digest.of_arrays(arrays), documents)
    digest.check_manifest(saved, documents)
    digest.check_arrays(saved, arrays)
    with pytest.raises(digest.CorruptCheckpoint, match="corrupt array: b/kernel"):
        digest.check_arrays(saved, arrays | {"b/kernel": arrays["b/kernel"].at[0, 0].add(1)})
    with pytest.raises(digest.CorruptCheckpoint, match="corrupt: data"):
        digest.check_manifest(saved, documents | {"data": {"step": 4}})
    with pytest.raises(digest.CorruptCheckpoint, match="manifest is corrupt"):
        digest.check_manifest(saved | {"arrays": {}}, documents)
    with pytest.raises(digest.CorruptCheckpoint, match="missing"):
        digest.check_manifest(None, documents)
