"""Attention for TPUs: the Pallas splash attention of JAX, on the arrays of one device."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.typing import DTypeLike

LANES = 128
MAX_BLOCK = 1024
# For heads wider than the lanes: a block of 1024 tokens with 512 channels does not fit into VMEM.
MAX_WIDE_BLOCK = 512
# The fused backward kernel writes a part of the queries' gradient per block of keys. Where all parts together are
# larger, the queries' gradient has a kernel of its own.
MAX_PARTS_BYTES = 2**30


class ValidKeys(splash_attention_mask.Mask):
    """Every query attends to the keys before `valid_length`, without an L x K array.

    Attributes:
      q_sequence, mask_function: the kernel computes the mask of partly visible blocks from these. A stored mask would
        be a residual of every layer.
    """

    def __init__(self, shape: tuple[int, int], valid_length: int):
        self._shape = shape
        self.valid_length = valid_length
        self.q_sequence = np.arange(shape[0], dtype=np.int32)

    def mask_function(self, query_ids: jax.Array, key_ids: jax.Array) -> jax.Array:
        """Whether keys are visible, for query and key ids of one shape."""
        return key_ids < self.valid_length

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        rows, columns = (np.arange(size)[part] for size, part in zip(self._shape, index, strict=True))
        return np.broadcast_to(columns < self.valid_length, (rows.size, columns.size))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ValidKeys) and (self.shape, self.valid_length) == (other.shape, other.valid_length)

    def __hash__(self) -> int:
        return hash((type(self), self._shape, self.valid_length))


def block_size(length: int, largest: int = MAX_BLOCK, cost: Callable[[int], float] = lambda size: 1.0) -> int:
    """The block size, a multiple of 128 and at most `largest`, with the least padding; among equals, the largest.

    Args:
      cost: of a token in blocks of a size, which weighs them.
    """
    # At least half of `largest`, for high utilization of the matrix unit; smaller blocks only for short sequences.
    least = min(math.ceil(largest / 2 / LANES), math.ceil(length / LANES)) * LANES
    candidates = range(least, largest + 1, LANES)
    return min(candidates, key=lambda size: (math.ceil(length / size) * size * cost(size), -size))


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float,
    valid_length: int | None = None,
    causal: bool = False,
    residual_name: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """softmax(scale * query key^T) value; shapes and dtypes as in `reference.attention`.

    Sequences are padded to whole blocks. Multiples of 512 need no padding; without padding and `valid_length` there is
    no mask.

    Args:
      residual_name: `checkpoint_name` of the residuals that are expensive to recompute.
      interpret: interpret the kernel, for tests without a TPU.
    """
    query_length, key_length = query.shape[1], key.shape[1]
    query_block, key_block = blocks(query_length, key_length, query.shape[3])
    query_HLD = padded(scaled(query, scale), query_block)
    key_HKD, value_HKD = padded(key, key_block), padded(value, key_block)
    shape = (query_HLD.shape[2], key_HKD.shape[2])
    valid = key_length if valid_length is None else valid_length
    one_head = splash_attention_mask.FullMask(shape) if valid == shape[1] else ValidKeys(shape, valid)
    if causal:
        one_head = splash_attention_mask.CausalMask(shape)
    kernel = splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([one_head]),
        block_sizes=block_sizes(query_HLD.shape, shape[1], query.dtype, query_block, key_block),
        residual_checkpoint_name=residual_name,
        interpret=interpret,
    )
    output = by_head(kernel, query_HLD, key_HKD, value_HKD)
    return rearrange(output[:, :, :query_length], "B N L D -> B L N D")


def by_head(kernel: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """A kernel of one head for every head of every batch entry, of arrays `B N ...`; `B N L D`.

    Heads are one axis that the TensorCores of a chip share. Splash's backward kernels have no such axis of their own:
    all heads in one kernel would run on one of the two TensorCores of v4 and v5p.
    """
    batch, heads = arrays[0].shape[:2]
    flat = [rearrange(array, "B N ... -> (B N) 1 ...") for array in arrays]
    return rearrange(jax.vmap(kernel)(*flat), "(B N) 1 L D -> B N L D", B=batch, N=heads)


def blocks(query_length: int, key_length: int, width: int) -> tuple[int, int]:
    """Block sizes of queries and keys for heads of `width` channels."""
    largest = MAX_BLOCK if width <= LANES else MAX_WIDE_BLOCK
    return block_size(query_length, largest), block_size(key_length, largest)


def block_sizes(
    shape: tuple[int, int, int, int], keys: int, dtype: DTypeLike, query_block: int, key_block: int
) -> splash_attention_kernel.BlockSizes:
    """Blocks of the forward and backward kernels; the backward pass is one fused kernel where its parts are small.

    Args:
      shape: of the padded queries, `B N L D`.
      keys: number of padded keys.
      dtype: of the queries.
      query_block, key_block: sizes that divide both.
    """
    sizes = {"block_q": query_block, "block_kv": key_block, "block_kv_compute": key_block}
    # Two blocks of keys per step halve the number of parts.
    step = key_block * (1 + (keys // key_block % 2 == 0 and shape[3] <= LANES))
    backward = {"block_q_dkv": query_block, "block_kv_dkv": step, "block_kv_dkv_compute": key_block}
    lanes = math.ceil(shape[3] / LANES) * LANES
    parts = keys // step * math.prod(shape[:3]) * lanes * jnp.dtype(dtype).itemsize
    if parts <= MAX_PARTS_BYTES:
        return splash_attention_kernel.BlockSizes(**sizes, **backward, use_fused_bwd_kernel=True)
    backward["block_kv_dkv"] = key_block
    return splash_attention_kernel.BlockSizes(**sizes, **backward, block_q_dq=query_block, block_kv_dq=key_block)


def scaled(query: jax.Array, scale: float) -> jax.Array:
    """scale * query, rounded once: a scale that is rounded to bfloat16 before would shift all scores."""
    return (query.astype(jnp.float32) * scale).astype(query.dtype)


def padded(array: jax.Array, block: int) -> jax.Array:
    """`B L N D` -> `B N L D` with L a multiple of `block`."""
    array = rearrange(array, "B L N D -> B N L D")
    return jnp.pad(array, ((0, 0), (0, 0), (0, -array.shape[2] % block), (0, 0)))
