"""Attention for TPUs: JAX's Pallas splash attention, on the arrays of one device."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

LANES = 128
LARGEST_BLOCK = 1024
# Heads wider than the lanes: a block of 1024 tokens of 512 channels does not fit into the memory of a TPU's core.
LARGEST_WIDE_BLOCK = 512


class ValidKeys(splash_attention_mask.Mask):
    """Every query sees the keys before `valid_length`; no L x K array exists.

    Attributes:
      q_sequence, mask_function: what the kernel computes the mask of partly visible blocks from. Stored blocks would be
        kept for the backward pass of every layer.
    """

    def __init__(self, shape: tuple[int, int], valid_length: int):
        self._shape = shape
        self.valid_length = valid_length
        self.q_sequence = np.arange(shape[0], dtype=np.int32)

    def mask_function(self, query_ids: jax.Array, key_ids: jax.Array) -> jax.Array:
        """Which keys are seen, for ids of one shape."""
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


def block_size(length: int, largest: int = LARGEST_BLOCK) -> int:
    """The block, a multiple of 128 and at most `largest`, that pads `length` least; the larger one of equals."""
    sizes = range(LANES, min(largest, math.ceil(length / LANES) * LANES) + 1, LANES)
    # Half of `largest` or more keeps the matrix unit busy; smaller blocks only for short sequences.
    candidates = [size for size in sizes if size >= min(largest // 2, max(sizes))]
    return min(candidates, key=lambda size: (math.ceil(length / size) * size, -size))


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

    Sequences are padded to whole blocks where they are not; lengths that are multiples of 512 need no padding, and
    without padding or `valid_length` no mask is read.

    Args:
      residual_name: `checkpoint_name` given to what the backward pass needs and cannot compute cheaply.
      interpret: run the kernel's steps on the host, for tests without a TPU.
    """
    query_length, key_length, heads = query.shape[1], key.shape[1], query.shape[2]
    largest = LARGEST_BLOCK if query.shape[3] <= LANES else LARGEST_WIDE_BLOCK
    query_block, key_block = block_size(query_length, largest), block_size(key_length, largest)
    query_HLD = _padded(query * jnp.asarray(scale, query.dtype), query_block)
    key_HKD, value_HKD = _padded(key, key_block), _padded(value, key_block)
    shape = (query_HLD.shape[2], key_HKD.shape[2])
    valid = key_length if valid_length is None else valid_length
    one_head = splash_attention_mask.FullMask(shape) if valid == shape[1] else ValidKeys(shape, valid)
    if causal:
        one_head = splash_attention_mask.CausalMask(shape)
    kernel = splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([one_head] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=query_block,
            block_kv=key_block,
            block_kv_compute=key_block,
            block_q_dkv=query_block,
            block_kv_dkv=key_block,
            block_kv_dkv_compute=key_block,
            block_q_dq=query_block,
            block_kv_dq=key_block,
        ),
        residual_checkpoint_name=residual_name,
        interpret=interpret,
    )
    output = jax.vmap(kernel)(query_HLD, key_HKD, value_HKD)
    return rearrange(output[:, :, :query_length], "B N L D -> B L N D")


def _padded(array: jax.Array, block: int) -> jax.Array:
    """`B L N D` -> `B N L D` with L a multiple of `block`."""
    array = rearrange(array, "B L N D -> B N L D")
    return jnp.pad(array, ((0, 0), (0, 0), (0, -array.shape[2] % block), (0, 0)))
