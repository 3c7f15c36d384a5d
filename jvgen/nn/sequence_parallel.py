"""Attention of a sequence whose tokens are split over devices, on the arrays of one of them.

* gather: every device gathers all keys and values, and attends with its queries.
* ulysses: queries, keys and values are exchanged, so that every device has all tokens of some heads, and the outputs
  are exchanged back (DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv 2309.14509). Heads that the devices do not divide are
  padded with heads of zeros, after the last one, to the next multiple.
* ring: keys and values go from neighbor to neighbor, and every device attends with its queries to what is there
  (Ring Attention, Liu et al. 2023, arXiv 2310.01889). Memory is that of two shards of keys, and each hop lies beside a
  kernel. In the backward pass the sums of the keys' and values' gradients go around with them.
"""

import dataclasses
import enum
import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

MeshAxis = str | tuple[str, ...]
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
# Before the first keys: no weight beside any score, and finite.
LOWEST_TOTAL = -1e30
# With so many tokens per device a kernel takes longer than the next keys and values need over one link of v5p, v5e or
# v6e, with 45% of the peak for the kernel: 4 L^2 FLOPs against 4 L bytes per channel; in the backward pass 2.5 and 3
# times as many.
RING_TOKENS = 3072


class SequenceParallel(enum.Enum):
    """How devices that share a sequence's tokens attend to all of them; all give the same numbers up to rounding."""

    AUTO = "auto"  # chosen by shapes, kernel and backend: see `choose`
    GATHER = "gather"
    ULYSSES = "ulysses"
    RING = "ring"


@dataclasses.dataclass(frozen=True)
class Way:
    """A way and why it was chosen."""

    way: SequenceParallel
    reason: str


def choose(platform: str, *, devices: int, tokens: int, heads: int, ring: bool) -> Way:
    """The way that AUTO stands for.

    Args:
      platform: "cpu", "gpu" or "tpu".
      devices: that share a sequence.
      tokens: keys per device.
      heads: per device before an exchange.
      ring: whether the kernel can attend to some keys at a time.
    """
    if platform == "cpu":
        return Way(SequenceParallel.GATHER, "CPU devices")
    if platform == "tpu" and ring and tokens >= RING_TOKENS:
        return Way(SequenceParallel.RING, f"{tokens} tokens per device, whose kernel takes longer than a hop")
    if heads % devices == 0 and devices > 2:
        # Four arrays of which a device gets a part of the heads, against two whole ones.
        return Way(
            SequenceParallel.ULYSSES, f"{heads} heads: {2 / devices:.0%} of the bytes of gathered keys and values"
        )
    return Way(SequenceParallel.GATHER, f"{heads} heads and {tokens} tokens per device")


def gathered(array: jax.Array, mesh_axis: MeshAxis) -> jax.Array:
    """All tokens of `B L N D` from the devices along a mesh axis; the transpose scatters gradients back.

    For the transfer, heads are merged and the devices' shards are stacked along a new first axis: TPUs pad narrow last
    axes, and reduce-scatter along the first axis only (along others they all-reduce and slice).
    """
    flat = rearrange(array, "B L N D -> B L (N D)")
    parts = jax.lax.all_gather(flat, mesh_axis, axis=0, tiled=False)
    return rearrange(parts, "S B L (N D) -> B (S L) N D", N=array.shape[2])


def by_heads(attend: Attend, mesh_axis: MeshAxis, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attention of all tokens for some heads per device, with tokens split before and after.

    Args:
      attend: of `B L N D` with all tokens.
      query, key, value: `B L N D` with the device's tokens.
    """
    heads, width = query.shape[2:]
    devices = jax.lax.axis_size(mesh_axis)

    def all_tokens(array: jax.Array) -> jax.Array:
        array = jnp.pad(array, ((0, 0), (0, 0), (0, -heads % devices), (0, 0)))
        parts = rearrange(array, "B L (S N) D -> S B L (N D)", S=devices)
        parts = jax.lax.all_to_all(parts, mesh_axis, split_axis=0, concat_axis=0, tiled=True)
        return rearrange(parts, "S B L (N D) -> B (S L) N D", D=width)

    output = attend(*(all_tokens(array) for array in (query, key, value)))
    parts = rearrange(output, "B (S L) N D -> S B L (N D)", S=devices)
    parts = jax.lax.all_to_all(parts, mesh_axis, split_axis=0, concat_axis=0, tiled=True)
    return rearrange(parts, "S B L (N D) -> B L (S N) D", D=width)[:, :, :heads]


@runtime_checkable
class Parts(Protocol):
    """A kernel that attends to some keys at a time, on arrays in its own layout. Hashable."""

    def queries(self, array: jax.Array) -> jax.Array:
        """`B L N D` in the kernel's layout."""
        ...

    def keys(self, array: jax.Array) -> jax.Array:
        """`B K N D`, keys or values, in the kernel's layout."""
        ...

    def tokens(self, array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The output as `B L N D`, of that shape."""
        ...

    def forward(self, valid: jax.Array, query: jax.Array, key: jax.Array, value: jax.Array) -> tuple:
        """The output in float32, and the logarithm of each query's sum of weights, which broadcasts against it.

        Both are arbitrary, NaN included, where `valid`, the number of valid keys, is zero.
        """
        ...

    def backward(
        self, valid: jax.Array, query: jax.Array, key: jax.Array, value: jax.Array, output: jax.Array, total: jax.Array,
        gradient: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
        """Gradients of the three, with the output and the logarithm of the sum over all parts of the keys."""
        ...


def ring(
    parts: Parts, mesh_axis: MeshAxis, valid: int, name: str, query: jax.Array, key: jax.Array, value: jax.Array
) -> jax.Array:
    """Attention to all keys while they go around.

    Args:
      valid: number of valid keys of all devices.
      name: `checkpoint_name` of the residuals that are expensive to recompute.
      query, key, value: `B L N D` with the device's tokens.
    """
    static = (parts, mesh_axis, valid, key.shape[1], name)
    return parts.tokens(_ring(static, parts.queries(query), parts.keys(key), parts.keys(value)), query.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(static: tuple, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    return _ring_forward(static, query, key, value)[0]


def _next(arrays: tuple, mesh_axis: MeshAxis) -> tuple:
    devices = jax.lax.axis_size(mesh_axis)
    return jax.lax.ppermute(arrays, mesh_axis, [(n, (n + 1) % devices) for n in range(devices)])


def _together(made: Any, following: tuple | None) -> tuple[Any, tuple | None]:
    """What a kernel made, and the next keys and values, which are there when both are.

    The hop after the next begins there, so that it lies beside the next kernel. XLA would run all hops one after the
    other before the first kernel.
    """
    return (made, None) if following is None else jax.lax.optimization_barrier((made, following))


def _valid_here(static: tuple, hop: int) -> jax.Array:
    """Valid keys of the shard that is here after some hops."""
    _, mesh_axis, valid, rows, _ = static
    owner = (jax.lax.axis_index(mesh_axis) - hop) % jax.lax.axis_size(mesh_axis)
    return jnp.clip(valid - owner * rows, 0, rows).astype(jnp.int32)


def _ring_forward(static: tuple, query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, tuple]:
    parts, mesh_axis, _, _, name = static
    devices = jax.lax.axis_size(mesh_axis)
    output, total, here = None, None, (key, value)
    for hop in range(devices):
        following = _next(here, mesh_axis) if hop + 1 < devices else None
        valid = _valid_here(static, hop)
        part, part_total = parts.forward(valid, query, *here)
        part, following = _together(part, following)
        part, part_total = jnp.where(valid > 0, part, 0.0), jnp.where(valid > 0, part_total, LOWEST_TOTAL)
        if output is None:
            output, total = part, part_total
        else:
            both = jnp.logaddexp(total, part_total)
            output = output * jnp.exp(total - both) + part * jnp.exp(part_total - both)
            total = both
        here = following
    output = checkpoint_name(output.astype(query.dtype), name)
    total = checkpoint_name(total, name)
    return output, (query, key, value, output, total)


def _ring_backward(static: tuple, residuals: tuple, gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    parts, mesh_axis, *_ = static
    query, key, value, output, total = residuals
    devices = jax.lax.axis_size(mesh_axis)
    of_query, sums, here = 0.0, (0.0, 0.0), (key, value)
    for hop in range(devices):
        following = _next(here, mesh_axis) if hop + 1 < devices else None
        made = parts.backward(_valid_here(static, hop), query, *here, output, total, gradient)
        made, following = _together(made, following)
        of_query, *of_pair = (
            before + new.astype(jnp.float32) for before, new in zip((of_query, *sums), made, strict=True)
        )
        if following is None:
            # Nothing is added after the last hop, which no kernel hides: as many bytes as keys and values.
            of_pair = [sum_.astype(array.dtype) for sum_, array in zip(of_pair, (key, value), strict=True)]
        # After as many hops as devices they are where their keys came from.
        sums, here = _next(tuple(of_pair), mesh_axis), following
    return of_query.astype(query.dtype), *sums


_ring.defvjp(_ring_forward, _ring_backward)
