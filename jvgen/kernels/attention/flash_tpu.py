"""Attention for TPUs by kernels of this project: layouts, blocks and precision around `flash_tpu_kernels`."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
from einops import rearrange

from jvgen.kernels.attention import flash_tpu_kernels
from jvgen.kernels.attention.tpu import LANES, block_size

# Tokens per grid step of queries and of keys at most, and keys per product; `python -m tests.benchmarks splash_tpu`
# counts cycles of others.
DEFAULT_BLOCKS = (896, 1792, 896)
# The same for heads wider than the lanes; and at most of each for those wider than twice the lanes, whose tiles would
# else not fit into VMEM.
WIDE_BLOCKS = (2240, 512, 256)
WIDEST_BLOCK = 512
# Cycles of a key in products of 128 of them, against longer ones: 13 x 128 keys are better padded to 14 x 128.
SHORT_PRODUCT = 1.2


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

    Sequences are padded to whole blocks; blocks of keys without a valid one are not computed.

    Args:
      residual_name: `checkpoint_name` of the residuals that are expensive to recompute.
      interpret: interpret the kernels, for tests without a TPU.
    """
    length, heads = query.shape[1:3]
    keys = key.shape[1] if valid_length is None else valid_length
    query_block, key_block, compute_block = blocks(length, keys, query.shape[3])
    masked = keys % key_block != 0
    power, factor = _factors(scale)
    sizes = (query_block, key_block, compute_block)
    static = flash_tpu_kernels.Static(masked, causal, *sizes, factor, residual_name, interpret)
    key, value = (array[:, : math.ceil(keys / key_block) * key_block] for array in (key, value))
    query_T = _transposed(query * jnp.asarray(power, query.dtype), query_block)
    key_T, value_T = _transposed(key, key_block), _transposed(value, key_block)
    output_T = flash_tpu_kernels.attention(static, jnp.array([keys], jnp.int32), query_T, key_T, value_T)
    return rearrange(output_T[..., :length], "(B N) D L -> B L N D", N=heads)


def refusal(device_kind: str) -> str:
    """Why the kernels cannot run on a kind of device, as JAX names it; empty if they can."""
    old = re.match(r"TPU v[234]", device_kind)
    return f"{device_kind} has 16 MiB of VMEM, the kernels take {flash_tpu_kernels.VMEM_BYTES >> 20}" if old else ""


def slower(device_kind: str, width: int) -> str:
    """Why splash attention takes fewer cycles on a kind of device, for heads of `width` channels; empty if it does not.

    Tables of cycles by chip and call: `docs/measured.md`.
    """
    widest = {"TPU v5 lite": LANES, "TPU v5e": LANES, "TPU v6 lite": 2 * LANES, "TPU v6e": 2 * LANES}.get(device_kind)
    wide = widest is not None and width > widest
    return f"splash attention takes fewer cycles for heads wider than {widest} on {device_kind}" if wide else ""


def blocks(query_length: int, key_length: int, width: int) -> tuple[int, int, int]:
    """Tokens per grid step of queries and of keys, and keys per product, for heads of `width` channels."""
    largest = largest_blocks(width)
    product = functools.partial(_product, largest=largest[2])
    query_block = block_size(query_length, largest[0])
    key_block = block_size(key_length, largest[1], lambda block: 1.0 if product(block) > LANES else SHORT_PRODUCT)
    return query_block, key_block, product(key_block)


def _product(key_block: int, largest: int) -> int:
    """Keys per product: the most that divide a block."""
    return max(n for n in range(LANES, largest + 1, LANES) if key_block % n == 0)


def largest_blocks(width: int) -> tuple[int, int, int]:
    """What `blocks` has at most."""
    if width > 2 * LANES:
        return tuple(min(size, WIDEST_BLOCK) for size in DEFAULT_BLOCKS)
    return DEFAULT_BLOCKS if width <= LANES else WIDE_BLOCKS


def _factors(scale: float) -> tuple[float, float]:
    """A factor on the queries that is a power of two, which is exact, and the rest of it on scores of base 2."""
    power = 2.0 ** math.floor(math.log2(scale))
    return power, scale * math.log2(math.e) / power


def _transposed(array: jax.Array, block: int) -> jax.Array:
    """`B L N D` -> `(B N) D L` with L a multiple of `block`."""
    array = rearrange(array, "B L N D -> (B N) D L")
    return jnp.pad(array, ((0, 0), (0, 0), (0, -array.shape[2] % block)))


@dataclasses.dataclass(frozen=True)
class Parts:
    """Attention to some keys at a time, as `jvgen.nn.sequence_parallel.Parts`; arrays are `(B N) D L`."""

    static: flash_tpu_kernels.Static
    power: float

    @classmethod
    def of(cls, rows: int, width: int, scale: float, interpret: bool) -> "Parts":
        """For so many queries, and as many keys, of heads of `width` channels."""
        power, factor = _factors(scale)
        return cls(flash_tpu_kernels.Static(True, False, *blocks(rows, rows, width), factor, None, interpret), power)

    def queries(self, array: jax.Array) -> jax.Array:
        return _transposed(array * jnp.asarray(self.power, array.dtype), self.static.query_block)

    def keys(self, array: jax.Array) -> jax.Array:
        return _transposed(array, self.static.key_block)

    def tokens(self, array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return rearrange(array[:, :, : shape[1]], "(B N) D L -> B L N D", N=shape[2])

    def forward(self, valid: jax.Array, query: jax.Array, key: jax.Array, value: jax.Array) -> tuple:
        output, log_total = flash_tpu_kernels.forward(self.static, valid[None], query, key, value, jnp.float32)
        return output, flash_tpu_kernels.LN_2 * log_total

    def backward(self, valid, query, key, value, output, total, gradient) -> tuple[jax.Array, jax.Array, jax.Array]:
        shared, log_total = flash_tpu_kernels.shared_term(output, gradient), total / flash_tpu_kernels.LN_2
        arrays = (query, key, value, gradient, log_total, shared)
        return flash_tpu_kernels.backward(self.static, valid[None], *arrays, jnp.float32)
