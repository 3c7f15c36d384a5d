"""Epipolar attention for TPUs: a flash kernel in Pallas that computes the bias of each tile from lines and points.

Scores have keys in rows and queries in columns. So per-query values (maximum, sum, line) are rows of a tile, which fill
the lanes, also with a head width of 64. The recurrence is that of FlashAttention (Dao et al. 2022, arXiv 2205.14135);
tiles without a key in the band of any query are skipped.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jvgen.kernels.attention.tpu import block_size
from jvgen.kernels.epipolar_attention.reference import line_distances

MAX_BLOCK = 512
LOWEST = -1e38


@dataclasses.dataclass(frozen=True)
class Static:
    """Values known at trace time.

    Attributes:
      keys: number of valid keys.
      query_block, key_block: block sizes.
      name: of residuals.
      interpret: interpreter mode.
      factor: of the products of queries and keys.
    """

    keys: int
    query_block: int
    key_block: int
    name: str | None
    interpret: bool
    factor: float = 1.0


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lines: jax.Array,
    points: jax.Array,
    width: jax.Array,
    slope: jax.Array,
    *,
    scale: float,
    residual_name: str | None = None,
    interpret: bool = False,
    largest_block: int = MAX_BLOCK,
) -> jax.Array:
    """As `reference.attention`, with products in the dtype of the inputs.

    Args:
      residual_name: `checkpoint_name` of the residuals that are expensive to recompute.
      interpret: interpret the kernel, for tests without a TPU.
      largest_block: maximum number of queries and of keys per tile.
    """
    length, keys = query.shape[1], key.shape[1]
    # Queries are multiplied by a power of 2, which is exact; the rest of the scale multiplies float32 scores.
    power = 2.0 ** math.floor(math.log2(scale))
    block_sizes = block_size(length, largest_block), block_size(keys, largest_block)
    static = Static(keys, *block_sizes, residual_name, interpret, factor=scale / power)
    query_pad, key_pad = -length % static.query_block, -keys % static.key_block
    slope, width, lines, points = jax.lax.stop_gradient((slope, width, lines, points))
    rows = bias_rows(lines, points, width, slope)
    rows = jnp.pad(rearrange(rows, "b l x -> b x l"), ((0, 0), (0, 0), (0, query_pad)))
    points = jnp.pad(points, ((0, key_pad), (0, 0)), mode="edge")
    query_T = jnp.pad(
        rearrange(query * jnp.asarray(power, query.dtype), "b l n d -> b n d l"),
        ((0, 0), (0, 0), (0, 0), (0, query_pad)),
    )
    key, value = (
        jnp.pad(rearrange(a, "b k n d -> b n k d"), ((0, 0), (0, 0), (0, key_pad), (0, 0))) for a in (key, value)
    )
    seen = visible(rows, points, static)
    output_T = _attention(static, query_T, key, value, rows, points, seen)
    return rearrange(output_T[..., :length], "b n d l -> b l n d")


def bias_rows(lines: jax.Array, points: jax.Array, width: jax.Array, slope: jax.Array) -> jax.Array:
    """Per query a line a, b, c and a threshold t, `B L 4`: the bias is -max(0, |line . point| - t).

    All are in units of the bias. For a query that is farther than its band's width from all keys, t is the distance of
    the nearest one. The softmax is the same, and the nearest key has no bias, so that its tile is never skipped.
    """
    lines = lines * slope[:, None, None]
    nearest = jnp.min(line_distances(lines, points), axis=-1, keepdims=True)
    return jnp.concatenate([lines, jnp.maximum((slope * width)[:, None, None], nearest)], axis=-1)


def visible(rows: jax.Array, points: jax.Array, static: Static) -> jax.Array:
    """Tiles with a query whose band may contain one of the keys: int32 `B I J`.

    Computed from the bounding box of each block of keys: a line misses the box if all corners are on one side, and then
    the nearest corner has the minimum distance. With a soft bias all keys have some weight, and all tiles are computed
    except those with a bias that no score can compensate.
    """
    boxes = rearrange(points, "(j k) x -> j k x", k=static.key_block)
    low, high = boxes.min(axis=1), boxes.max(axis=1)
    corners = [jnp.stack([x[:, 0], y[:, 1]], axis=-1) for x in (low, high) for y in (low, high)]
    a, b, c, threshold = (rows[:, i, None, :] for i in range(4))
    signed = jnp.stack([a * corner[:, 0, None] + b * corner[:, 1, None] + c for corner in corners])
    crossed = (signed.max(axis=0) >= 0) & (signed.min(axis=0) <= 0)
    least = jnp.where(crossed, 0.0, jnp.abs(signed).min(axis=0))
    # With a lower bias the float32 weights are zero for any scores of a trained network: some key has a bias of 0.
    near = least - threshold < 1e4
    # The tile with that key, also where rounding of a steep bias puts it outside: without a tile the output is 0 / 0.
    near |= least <= least.min(axis=1, keepdims=True)
    return jnp.any(rearrange(near, "b j (i l) -> b i j l", l=static.query_block), axis=-1).astype(jnp.int32)


def _bias(rows: jax.Array, points: jax.Array) -> jax.Array:
    a, b, c, threshold = (rows[i : i + 1] for i in range(4))
    return -jnp.maximum(jnp.abs(points[:, 0:1] * a + points[:, 1:2] * b + c) - threshold, 0.0)


def _scores(static: Static, column: jax.Array, query_T: jax.Array, key: jax.Array, rows: jax.Array, points: jax.Array):
    scores = _factored(static, _product(key, query_T, 1, 0)) + _bias(rows, points)
    index = column * static.key_block + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    return jnp.where(index < static.keys, jnp.maximum(scores, LOWEST), LOWEST)


def _factored(static: Static, array: jax.Array) -> jax.Array:
    return array if static.factor == 1.0 else static.factor * array


def _weights(scores: jax.Array, highest: jax.Array) -> jax.Array:
    # No score exceeds the highest, unless it is computed twice and rounded differently: a hard band has scores of 1e30.
    return jnp.exp(jnp.minimum(scores - highest, 0.0))


def _product(left: jax.Array, right: jax.Array, over_left: int, over_right: int) -> jax.Array:
    dimensions = (((over_left,), (over_right,)), ((), ()))
    # Explicit for bfloat16 too: the compiler rejects a process-wide default of float32 passes there.
    exact = left.dtype == jnp.float32
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        left, right.astype(left.dtype), dimensions, precision=precision, preferred_element_type=jnp.float32
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: Static, query_T, key, value, rows, points, seen) -> jax.Array:
    return _forward(static, query_T, key, value, rows, points, seen)[0]


def _forward(static: Static, query_T, key, value, rows, points, seen) -> tuple[jax.Array, tuple]:
    batch, heads, width, length = query_T.shape
    queries, columns = length // static.query_block, key.shape[2] // static.key_block
    output_T, log_total = pl.pallas_call(
        functools.partial(_forward_kernel, static, columns),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, queries, columns),
            in_specs=_specs(static, width, queries_inner=False)[:5],
            out_specs=[
                pl.BlockSpec((None, None, width, static.query_block), lambda b, n, i, j, s: (b, n, 0, i)),
                pl.BlockSpec((None, None, 1, static.query_block), lambda b, n, i, j, s: (b, n, 0, i)),
            ],
            scratch_shapes=[
                pltpu.VMEM((1, static.query_block), jnp.float32),
                pltpu.VMEM((1, static.query_block), jnp.float32),
                pltpu.VMEM((width, static.query_block), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(query_T.shape, query_T.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32),
        ],
        compiler_params=_parameters(),
        interpret=static.interpret,
        name="epipolar_attention_forward",
    )(seen, query_T, key, value, rows, points)
    if static.name is not None:
        output_T, log_total = checkpoint_name(output_T, static.name), checkpoint_name(log_total, static.name)
    return output_T, (query_T, key, value, rows, points, seen, output_T, log_total)


def _forward_kernel(
    static: Static, columns: int, seen, query_T, key, value, rows, points, output_T, log_total, largest, total, sum_T
) -> None:
    batch, row, column = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(column == 0)
    def _initialize() -> None:
        largest[...] = jnp.full_like(largest, LOWEST)
        total[...] = jnp.zeros_like(total)
        sum_T[...] = jnp.zeros_like(sum_T)

    @pl.when(seen[batch, row, column] > 0)
    def _tile() -> None:
        scores = _scores(static, column, query_T[...], key[...], rows[...], points[...])
        highest = jnp.maximum(largest[...], jnp.max(scores, axis=0, keepdims=True))
        weights, decay = _weights(scores, highest), jnp.exp(largest[...] - highest)
        largest[...] = highest
        total[...] = total[...] * decay + jnp.sum(weights, axis=0, keepdims=True)
        sum_T[...] = sum_T[...] * decay + _product(value[...], weights, 0, 0)

    @pl.when(column == columns - 1)
    def _write() -> None:
        output_T[...] = (sum_T[...] / total[...]).astype(output_T.dtype)
        log_total[...] = largest[...] + jnp.log(total[...])


def _backward(static: Static, residuals: tuple, gradient_T: jax.Array) -> tuple:
    query_T, key, value, rows, points, seen, output_T, log_total = residuals
    batch, heads, width, length = query_T.shape
    queries, columns = length // static.query_block, key.shape[2] // static.key_block
    shared = jnp.sum(output_T.astype(jnp.float32) * gradient_T.astype(jnp.float32), axis=2, keepdims=True)
    arguments = (seen, query_T, key, value, rows, points, gradient_T, log_total, shared)
    of_query_T = pl.pallas_call(
        functools.partial(_query_kernel, static, columns),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, queries, columns),
            in_specs=_specs(static, width, queries_inner=False),
            out_specs=pl.BlockSpec((None, None, width, static.query_block), lambda b, n, i, j, s: (b, n, 0, i)),
            scratch_shapes=[pltpu.VMEM((width, static.query_block), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(query_T.shape, query_T.dtype),
        compiler_params=_parameters(),
        interpret=static.interpret,
        name="epipolar_attention_queries",
    )(*arguments)
    of_key_T, of_value_T = pl.pallas_call(
        functools.partial(_key_kernel, static, queries),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, columns, queries),
            in_specs=_specs(static, width, queries_inner=True),
            out_specs=[
                pl.BlockSpec((None, None, width, static.key_block), lambda b, n, j, i, s: (b, n, 0, j))
                for _ in range(2)
            ],
            scratch_shapes=[pltpu.VMEM((width, static.key_block), jnp.float32) for _ in range(2)],
        ),
        out_shape=[jax.ShapeDtypeStruct((batch, heads, width, key.shape[2]), key.dtype) for _ in range(2)],
        compiler_params=_parameters(),
        interpret=static.interpret,
        name="epipolar_attention_keys",
    )(*arguments)
    of_key, of_value = (rearrange(array, "b n d k -> b n k d") for array in (of_key_T, of_value_T))
    return of_query_T, of_key, of_value, jnp.zeros_like(rows), jnp.zeros_like(points), None


def _score_gradient(static, column, query_T, key, value, rows, points, gradient_T, log_total, shared):
    """Weights of a tile, and the gradient of its scores."""
    weights = _weights(_scores(static, column, query_T, key, rows, points), log_total)
    return weights, weights * (_product(value, gradient_T, 1, 0) - shared)


def _query_kernel(
    static, columns, seen, query_T, key, value, rows, points, gradient_T, log_total, shared, of_query_T, sum_T
) -> None:
    batch, row, column = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(column == 0)
    def _initialize() -> None:
        sum_T[...] = jnp.zeros_like(sum_T)

    @pl.when(seen[batch, row, column] > 0)
    def _tile() -> None:
        tile = [ref[...] for ref in (query_T, key, value, rows, points, gradient_T, log_total, shared)]
        _, of_scores = _score_gradient(static, column, *tile)
        sum_T[...] += _product(key[...], of_scores, 0, 0)

    @pl.when(column == columns - 1)
    def _write() -> None:
        of_query_T[...] = _factored(static, sum_T[...]).astype(of_query_T.dtype)


def _key_kernel(
    static, queries, seen, query_T, key, value, rows, points, gradient_T, log_total, shared,
    of_key_T, of_value_T, key_sum_T, value_sum_T,
) -> None:  # fmt: skip
    batch, column, row = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(row == 0)
    def _initialize() -> None:
        key_sum_T[...] = jnp.zeros_like(key_sum_T)
        value_sum_T[...] = jnp.zeros_like(value_sum_T)

    @pl.when(seen[batch, row, column] > 0)
    def _tile() -> None:
        tile = [ref[...] for ref in (query_T, key, value, rows, points, gradient_T, log_total, shared)]
        weights, of_scores = _score_gradient(static, column, *tile)
        value_sum_T[...] += _product(gradient_T[...], weights, 1, 1)
        key_sum_T[...] += _product(query_T[...], of_scores, 1, 1)

    @pl.when(row == queries - 1)
    def _write() -> None:
        of_key_T[...] = _factored(static, key_sum_T[...]).astype(of_key_T.dtype)
        of_value_T[...] = value_sum_T[...].astype(of_value_T.dtype)


def _specs(static: Static, width: int, *, queries_inner: bool) -> list[pl.BlockSpec]:
    """Blocks of query, key, value, rows, points, gradient, log_total, shared; the last grid axis is the inner one."""
    q, k = static.query_block, static.key_block

    def spec(shape: tuple, place) -> pl.BlockSpec:
        if queries_inner:
            return pl.BlockSpec(shape, lambda b, n, j, i, s: place(b, n, i, j))
        return pl.BlockSpec(shape, lambda b, n, i, j, s: place(b, n, i, j))

    by_query = spec((None, None, width, q), lambda b, n, i, j: (b, n, 0, i))
    by_key = spec((None, None, k, width), lambda b, n, i, j: (b, n, j, 0))
    number = spec((None, None, 1, q), lambda b, n, i, j: (b, n, 0, i))
    rows = spec((None, 4, q), lambda b, n, i, j: (b, 0, i))
    points = spec((k, 3), lambda b, n, i, j: (j, 0))
    return [by_query, by_key, by_key, rows, points, by_query, number, number]


def _parameters() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"))


_attention.defvjp(_forward, _backward)
