"""Digests of array contents, independent of sharding and computed on the devices.

Every element contributes a 64-bit word mixed from its bits and its position, and the words are added modulo 2^32 in
two lanes. Integer sums are exact in any order, so one device, eight or a whole pod compute the same digest without
copying arrays to a host. For a fixed position the mixing is one-to-one: a change of a single element always changes the
digest; other corruption is missed with probability 2^-64.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jvgen import exit_codes
from jvgen.training.state import on_devices

VERSION = 1


@jax.jit
def _words(value: jax.Array) -> jax.Array:
    bits = _bits(value)
    # Row-major position modulo 2^32 in the global array, whatever its sharding.
    position = jnp.zeros(bits.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(bits.ndim)):
        position = position + lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    position_word = _mix(position + jnp.uint32(0x9E3779B9))
    first = _mix(bits ^ position_word)
    second = _mix((bits + jnp.uint32(0x7F4A7C15)) * jnp.uint32(0x2545F491) + position_word)
    # Read in the same pass, and no part of the digest.
    invalid = jnp.any(~jnp.isfinite(value)) if jnp.issubdtype(value.dtype, jnp.inexact) else jnp.bool_(False)
    return jnp.stack([jnp.sum(first, dtype=jnp.uint32), jnp.sum(second, dtype=jnp.uint32), invalid.astype(jnp.uint32)])


def _bits(value: jax.Array) -> jax.Array:
    if value.dtype == jnp.bool_:
        return value.astype(jnp.uint32)
    width = value.dtype.itemsize
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(width, jnp.uint32)
    # 8-byte types become two words on a new last axis.
    return lax.bitcast_convert_type(value, unsigned).astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """MurmurHash3's 32-bit finalizer (Appleby 2011, public domain): a one-to-one map."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def start(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Start computing the digest of every array on the devices, and whether it is finite; does not wait (except on
    several CPU devices)."""
    words = {}
    for name, value in arrays.items():
        value = on_devices(value)
        with jax.disable_jit(False):
            words[name] = _words(value)
        if len(value.sharding.device_set) > 1 and jax.default_backend() == "cpu":
            # CPU devices share one thread pool: concurrent programs with collectives can deadlock.
            words[name].block_until_ready()
    return words


def finish(words: Mapping[str, jax.Array]) -> dict[str, str]:
    """Wait for `start` and return 16 hexadecimal digits per array."""
    host = jax.device_get(dict(words))
    return {name: "".join(f"{int(word):08x}" for word in np.asarray(three)[:2]) for name, three in host.items()}


def not_finite(words: Mapping[str, jax.Array]) -> list[str]:
    """Wait for `start` and return the names of arrays that hold NaN or infinity."""
    return [name for name, three in jax.device_get(dict(words)).items() if np.asarray(three)[2]]


def of_arrays(arrays: Mapping[str, jax.Array]) -> dict[str, str]:
    """The digest of every array."""
    return finish(start(arrays))


def of_document(document: Any) -> str:
    """SHA-256 of a JSON document in its canonical form (sorted keys, no whitespace)."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def manifest(
    arrays: Mapping[str, jax.Array], digests: Mapping[str, str], documents: Mapping[str, Any]
) -> dict[str, Any]:
    """The manifest saved in a checkpoint: shape, dtype and digest of every array, digests of its other documents."""
    body = {
        "version": VERSION,
        "arrays": {
            name: {"shape": list(value.shape), "dtype": str(value.dtype), "digest": digests[name]}
            for name, value in sorted(arrays.items())
        },
        "documents": {name: of_document(document) for name, document in sorted(documents.items())},
    }
    return body | {"self": of_document(body)}


class CorruptCheckpoint(Exception):
    """A checkpoint does not hold what was written; the message names the arrays or documents."""

    exit_code = exit_codes.USER_ERROR


def check_manifest(saved: Any, documents: Mapping[str, Any]) -> None:
    """Raise `CorruptCheckpoint` unless the manifest is intact and matches the documents."""
    if not isinstance(saved, dict) or "self" not in saved:
        raise CorruptCheckpoint("its manifest is missing or unreadable")
    body = {key: value for key, value in saved.items() if key != "self"}
    if of_document(body) != saved["self"]:
        raise CorruptCheckpoint("its manifest is corrupt")
    if body["version"] != VERSION:
        raise CorruptCheckpoint(f"its manifest has version {body['version']}, this version of jvgen reads {VERSION}")
    wrong = [name for name, document in documents.items() if body["documents"].get(name) != of_document(document)]
    if wrong:
        raise CorruptCheckpoint(f"corrupt: {', '.join(wrong)}")


def check_arrays(saved: dict[str, Any], arrays: Mapping[str, jax.Array]) -> None:
    """Raise `CorruptCheckpoint` naming every array that differs from what was saved. Check the manifest first."""
    found = of_arrays(arrays)
    wrong = [name for name in sorted(arrays) if saved["arrays"].get(name, {}).get("digest") != found[name]]
    if wrong:
        listed = ", ".join(wrong[:20]) + (f" and {len(wrong) - 20} more" if len(wrong) > 20 else "")
        raise CorruptCheckpoint(f"corrupt array{'s' if len(wrong) > 1 else ''}: {listed}")
