"""The Pallas kernels of attention for TPUs: one for the forward pass, one for the whole backward pass.

Arrays have channels in rows and tokens in columns, scores keys in rows and queries in columns. So heads of 64 channels
fill tiles of 128 lanes in memory, per-query values are rows of a tile, and products whose output has the channels of a
head in rows stream 64 rows through the matrix unit, where channels in columns would take as long as 128. The recurrence
is that of FlashAttention (Dao et al. 2022, arXiv 2205.14135), in powers of two.

A head whose scores are bounded by the norms of its queries and keys needs no running maximum: see `LIMIT`.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LOWEST = -1e38
# Scores (base 2) within this bound need no maximum: weights and sums over 2^24 keys lie within 2^-64 and 2^88, far from
# where float32 and bfloat16 end (2^-126, 2^127).
LIMIT = 64.0
LN_2 = math.log(2.0)
SUBLANES = 8
# The queries' gradient of a head stays in VMEM while keys pass: float32 sums and two buffers of the result. Longer
# sequences take the kernel several times.
MAX_QUERY_BYTES = 24 * 2**20
# Of 64 MiB of a TensorCore of v5p and later, 128 of v5e and v6e; older chips have 16.
VMEM_BYTES = 48 * 2**20


@dataclasses.dataclass(frozen=True)
class Static:
    """Values known at trace time.

    Attributes:
      masked: whether some keys may not be valid.
      causal: whether query i sees keys 0..i only.
      query_block, key_block: tokens per grid step.
      compute_block: keys per product.
      factor: of the products of queries and keys, log2(e) in it: what is no power of two in it would round queries.
      name: `checkpoint_name` of residuals.
      interpret: interpreter mode.
    """

    masked: bool
    causal: bool
    query_block: int
    key_block: int
    compute_block: int
    factor: float
    name: str | None
    interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(static: Static, valid: jax.Array, query_T: jax.Array, key_T: jax.Array, value_T: jax.Array) -> jax.Array:
    """softmax of base 2 over factor * query key^T, times value.

    Args:
      static: lengths are multiples of its blocks.
      valid: int32 `1`, number of keys that are not padding; blocks of keys without one are not computed.
      query_T: `H D L`, heads of all batch entries.
      key_T, value_T: `H D K`.

    Returns:
      `H D L` in the dtype of `query_T`.
    """
    return _forward(static, valid, query_T, key_T, value_T)[0]


def _forward(static: Static, valid, query_T, key_T, value_T) -> tuple[jax.Array, tuple]:
    output_T, log_total = forward(static, valid, query_T, key_T, value_T, query_T.dtype)
    if static.name is not None:
        output_T, log_total = checkpoint_name(output_T, static.name), checkpoint_name(log_total, static.name)
    return output_T, (valid, query_T, key_T, value_T, output_T, log_total)


def _backward(static: Static, residuals: tuple, gradient_T: jax.Array) -> tuple:
    valid, query_T, key_T, value_T, output_T, log_total = residuals
    shared = shared_term(output_T, gradient_T)
    dtype = key_T.dtype
    return None, *backward(static, valid, query_T, key_T, value_T, gradient_T, log_total, shared, dtype)


attention.defvjp(_forward, _backward)


def shared_term(output_T: jax.Array, gradient_T: jax.Array) -> jax.Array:
    """What the gradients of all scores of a query have in common: float32 `H 1 L`."""
    return jnp.sum(output_T.astype(jnp.float32) * gradient_T.astype(jnp.float32), axis=1, keepdims=True)


def bounded(query_T: jax.Array, key_T: jax.Array, factor: float = 1.0) -> jax.Array:
    """Heads whose scores the norms of queries and keys bound by `LIMIT`: int32 `H`."""
    longest = (jnp.max(jnp.sum(jnp.square(array.astype(jnp.float32)), axis=1), axis=1) for array in (query_T, key_T))
    return (math.prod(longest) <= (LIMIT / factor) ** 2).astype(jnp.int32)


def forward(static: Static, valid, query_T, key_T, value_T, dtype) -> tuple[jax.Array, jax.Array]:
    """The output in `dtype`, and the logarithm (base 2) of each query's sum of weights, float32 `H 1 L`.

    The output is NaN if no key is valid.
    """
    heads, width, length = query_T.shape
    query_block, key_block = static.query_block, static.key_block
    columns = key_T.shape[2] // key_block
    by_query = pl.BlockSpec((None, width, query_block), lambda h, i, j, *_: (h, 0, i))
    by_key = pl.BlockSpec((None, width, key_block), lambda h, i, j, *_: (h, 0, j))
    output_T, log_total = pl.pallas_call(
        functools.partial(_forward_kernel, static),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(heads, length // query_block, columns),
            in_specs=[by_query, by_key, by_key],
            out_specs=[by_query, pl.BlockSpec((None, 1, query_block), lambda h, i, j, *_: (h, 0, i))],
            scratch_shapes=[
                pltpu.VMEM((1, query_block), jnp.float32),
                pltpu.VMEM((SUBLANES, query_block), jnp.float32),
                pltpu.VMEM((width, query_block), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(query_T.shape, dtype),
            jax.ShapeDtypeStruct((heads, 1, length), jnp.float32),
        ],
        compiler_params=_parameters("parallel", "parallel", "arbitrary"),
        interpret=static.interpret,
        name="attention_forward" + _suffix(static),
    )(valid, bounded(query_T, key_T, static.factor), query_T, key_T, value_T)
    return output_T, log_total


def _forward_kernel(
    static: Static, valid, is_bounded, query_T, key_T, value_T, output_T, log_total, largest, total, sum_T
) -> None:
    head, row, column = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    columns = pl.num_programs(2)

    @pl.when(column == 0)
    def _initialize() -> None:
        largest[...] = jnp.full_like(largest, LOWEST)
        total[...] = jnp.zeros_like(total)
        sum_T[...] = jnp.zeros_like(sum_T)

    def part(masked: bool, start: int) -> tuple[jax.Array, jax.Array]:
        keys = slice(start, start + static.compute_block)
        place = (row, column, start, valid[0])
        return _scores(static, masked, place, query_T[...], key_T[:, keys]), value_T[:, keys]

    def with_bound(masked: bool) -> None:
        for start in range(0, static.key_block, static.compute_block):
            scores, some_value_T = part(masked, start)
            weights = jnp.exp2(scores)
            total[...] += jnp.sum(weights.reshape(-1, SUBLANES, weights.shape[1]), axis=0)
            sum_T[...] += _product(some_value_T, weights, 1, 0)

    def with_maximum(masked: bool) -> None:
        for start in range(0, static.key_block, static.compute_block):
            scores, some_value_T = part(masked, start)
            highest = jnp.maximum(largest[...], jnp.max(scores, axis=0, keepdims=True))
            weights, decay = jnp.exp2(scores - highest), jnp.exp2(largest[...] - highest)
            largest[...] = highest
            total[...] = total[...] * decay + jnp.sum(weights.reshape(-1, SUBLANES, weights.shape[1]), axis=0)
            sum_T[...] = sum_T[...] * decay + _product(some_value_T, weights, 1, 0)

    for of_bounded, tile in ((1, with_bound), (0, with_maximum)):
        _with_and_without_mask(static, row, column, valid[0], is_bounded[head] == of_bounded, tile)

    @pl.when(column == columns - 1)
    def _write() -> None:
        all_weights = jnp.sum(total[...], axis=0, keepdims=True)
        output_T[...] = (sum_T[...] / all_weights).astype(output_T.dtype)
        # Zero where there is a bound.
        shift = jnp.where(is_bounded[head] == 1, 0.0, largest[...])
        log_total[...] = shift + jnp.log2(all_weights)


def _with_and_without_mask(static: Static, row, column, valid, chosen, tile) -> None:
    """Run `tile` with a mask in blocks that need one, without it in all others that are seen."""
    if not (static.causal or static.masked):
        pl.when(chosen)(lambda: tile(False))
        return
    first, end = column * static.key_block, (column + 1) * static.key_block
    needs_mask, seen = end > valid, first < valid
    if static.causal:
        needs_mask = needs_mask | (end - 1 > row * static.query_block)
        seen = seen & (first < (row + 1) * static.query_block)
    pl.when(chosen & seen & needs_mask)(lambda: tile(True))
    pl.when(chosen & seen & jnp.logical_not(needs_mask))(lambda: tile(False))


def _scores(static: Static, masked: bool, place: tuple, query_T, key_T) -> jax.Array:
    """Scores of keys and queries of a block at `place`: its row and column, the first key in it, all valid keys."""
    scores = static.factor * _product(key_T, query_T, 0, 0)
    if not masked:
        return scores
    row, column, start, valid = place
    keys = column * static.key_block + start + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    seen = keys < valid
    if static.causal:
        queries = row * static.query_block + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        seen = seen & (keys <= queries)
    return jnp.where(seen, scores, LOWEST)


def _product(left: jax.Array, right: jax.Array, over_left: int, over_right: int) -> jax.Array:
    dimensions = (((over_left,), (over_right,)), ((), ()))
    # Explicit for bfloat16 too: the compiler rejects a process-wide default of float32 passes there.
    exact = left.dtype == jnp.float32
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        left, right.astype(left.dtype), dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def backward(
    static: Static, valid, query_T, key_T, value_T, gradient_T, log_total, shared, dtype
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of queries, keys and values in `dtype`.

    Args:
      gradient_T: of the output.
      log_total, shared: over all keys, also where these are some of them: see `forward` and `shared_term`.
    """
    by_query = (query_T, gradient_T, log_total, shared)
    query_block = static.query_block
    counts = _blocks_per_call(
        query_T.shape[2] // query_block, query_T.shape[1] * query_block, jnp.dtype(dtype).itemsize
    )
    if len(counts) == 1:
        return _gradients(static, 0, (dtype, dtype), valid, key_T, value_T, *by_query)
    ends = [query_block * end for end in itertools.accumulate(counts)]

    # Parts of the gradients of keys and values are summed in float32.
    def of_part(first: int, end: int) -> tuple:
        part = (array[:, :, first:end] for array in by_query)
        return _gradients(static, first, (dtype, jnp.float32), valid, key_T, value_T, *part)

    of_query_T, of_key_T, of_value_T = zip(*itertools.starmap(of_part, itertools.pairwise([0, *ends])), strict=True)
    return jnp.concatenate(of_query_T, axis=-1), sum(of_key_T).astype(dtype), sum(of_value_T).astype(dtype)


def _blocks_per_call(blocks: int, block_elements: int, itemsize: int) -> list[int]:
    """Blocks of queries in each of the fewest calls that have `MAX_QUERY_BYTES` at most, in parts as equal as can be.

    Args:
      blocks: of queries.
      block_elements: of one of them.
      itemsize: bytes per number of the queries' gradient as it is written, in two buffers, beside its float32 sum.
    """
    each = max(1, MAX_QUERY_BYTES // (block_elements * (4 + 2 * itemsize)))
    calls = math.ceil(blocks / each)
    return [blocks // calls + (number < blocks % calls) for number in range(calls)]


def _gradients(
    static: Static, first: int, dtypes: tuple, valid, key_T, value_T, query_T, gradient_T, log_total, shared
) -> tuple:
    """Gradients of queries in one dtype and of keys and values in another; `first` is the place of the first query."""
    heads, width, length = query_T.shape
    query_block, key_block = static.query_block, static.key_block
    rows, columns = length // query_block, key_T.shape[2] // key_block
    by_query = pl.BlockSpec((None, width, query_block), lambda h, j, i, *_: (h, 0, i))
    number = pl.BlockSpec((None, 1, query_block), lambda h, j, i, *_: (h, 0, i))
    by_key = pl.BlockSpec((None, width, key_block), lambda h, j, i, *_: (h, 0, j))
    return pl.pallas_call(
        functools.partial(_backward_kernel, static, first // query_block),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(heads, columns, rows),
            in_specs=[by_query, by_key, by_key, by_query, number, number],
            out_specs=[pl.BlockSpec((None, width, length), lambda h, j, i, *_: (h, 0, 0)), by_key, by_key],
            scratch_shapes=[
                pltpu.VMEM((rows, width, query_block), jnp.float32),
                pltpu.VMEM((width, key_block), jnp.float32),
                pltpu.VMEM((width, key_block), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(query_T.shape, dtypes[0]),
            jax.ShapeDtypeStruct(key_T.shape, dtypes[1]),
            jax.ShapeDtypeStruct(value_T.shape, dtypes[1]),
        ],
        compiler_params=_parameters("parallel", "arbitrary", "arbitrary"),
        interpret=static.interpret,
        name="attention_backward" + _suffix(static),
    )(valid, query_T, key_T, value_T, gradient_T, log_total, shared)


def _backward_kernel(
    static: Static, first_row: int, valid, query_T, key_T, value_T, gradient_T, log_total, shared,
    of_query_T, of_key_T, of_value_T, query_sum_T, key_sum_T, value_sum_T,
) -> None:  # fmt: skip
    column, row = pl.program_id(1), pl.program_id(2)
    columns, rows = pl.num_programs(1), pl.num_programs(2)

    @pl.when(row == 0)
    def _initialize() -> None:
        key_sum_T[...] = jnp.zeros_like(key_sum_T)
        value_sum_T[...] = jnp.zeros_like(value_sum_T)

    @pl.when(column == 0)
    def _initialize_queries() -> None:
        query_sum_T[row] = jnp.zeros_like(query_sum_T[row])

    def tile(masked: bool) -> None:
        for start in range(0, static.key_block, static.compute_block):
            keys = slice(start, start + static.compute_block)
            some_key_T, some_value_T = key_T[:, keys], value_T[:, keys]
            place = (first_row + row, column, start, valid[0])
            weights = jnp.exp2(_scores(static, masked, place, query_T[...], some_key_T) - log_total[...])
            value_sum_T[:, keys] += _product(gradient_T[...], weights, 1, 1)
            of_scores = weights * (_product(some_value_T, gradient_T[...], 0, 0) - shared[...])
            key_sum_T[:, keys] += _product(query_T[...], of_scores, 1, 1)
            query_sum_T[row] += _product(some_key_T, of_scores, 1, 0)

    _with_and_without_mask(static, first_row + row, column, valid[0], jnp.asarray(True), tile)

    @pl.when(row == rows - 1)
    def _write() -> None:
        of_key_T[...] = (static.factor * LN_2 * key_sum_T[...]).astype(of_key_T.dtype)
        of_value_T[...] = value_sum_T[...].astype(of_value_T.dtype)

    @pl.when(column == columns - 1)
    def _write_queries() -> None:
        queries = pl.ds(pl.multiple_of(row * static.query_block, 128), static.query_block)
        of_query_T[:, queries] = (static.factor * LN_2 * query_sum_T[row]).astype(of_query_T.dtype)


def _suffix(static: Static) -> str:
    return "_masked" if static.masked or static.causal else ""


def _parameters(*semantics: str) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_BYTES)
