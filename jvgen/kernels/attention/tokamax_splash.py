"""Attention for TPUs: the splash attention of the package tokamax, which is optional, on the arrays of one device.

It differs from that of JAX in estimates of its cost, which XLA's scheduler reads, and in an optional fixed maximum. Its
module is not part of tokamax's stable interface: `TESTED` names the versions that this was tested with.
"""

import importlib
import importlib.metadata
from types import ModuleType

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

from jvgen.config import ConfigError
from jvgen.kernels.attention.tpu import ValidKeys, blocks, by_head, padded, scaled

TESTED = "0.0.12 (Python 3.11), 0.0.17 (Python 3.12 and later)"
_FOLDER = "tokamax._src.ops.experimental.tpu.splash_attention"
# Weights are exp(score - maximum): a fixed maximum above this could take all weights of a row below the least float32.
MAX_FIXED = 80.0


def splash() -> ModuleType:
    """tokamax's module of splash attention.

    Raises:
      ConfigError: it is not installed, or not where it was in the versions that were tested.
    """
    try:
        version = importlib.metadata.version("tokamax")
    except importlib.metadata.PackageNotFoundError:
        version = None
    if version is None:
        raise ConfigError(
            "attention = tokamax: the package tokamax is not installed; install jvgen[tokamax], or use auto."
        )
    try:
        return importlib.import_module(f"{_FOLDER}.splash_attention_kernel")
    except ImportError as error:
        raise ConfigError(
            f"attention = tokamax: tokamax {version} has no splash attention that can be imported ({error}); tested "
            f"are {TESTED}. Use auto."
        ) from error


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
    fixed_maximum: bool = False,
) -> jax.Array:
    """softmax(scale * query key^T) value; shapes, dtypes and arguments as in `jvgen.kernels.attention.tpu.attention`.

    Args:
      fixed_maximum: subtract one number per head from the scores, a bound that follows from the norms of queries and
        keys, in place of a running maximum. For networks that normalize both, where the bound is near the scores.

    Raises:
      ConfigError: see `splash`.
    """
    library = splash()
    query_length, key_length = query.shape[1], key.shape[1]
    query_block, key_block = blocks(query_length, key_length, query.shape[3])
    query_HLD = padded(scaled(query, scale), query_block)
    key_HKD, value_HKD = padded(key, key_block), padded(value, key_block)
    shape = (query_HLD.shape[2], key_HKD.shape[2])
    valid = key_length if valid_length is None else valid_length
    mask = library.mask_lib.FullMask(shape) if valid == shape[1] else ValidKeys(shape, valid)
    if causal:
        mask = splash_attention_mask.CausalMask(shape)
    config = library.SplashConfig(
        block_q=query_block,
        block_kv=key_block,
        block_q_dkv=query_block,
        block_kv_dkv=key_block,
        residual_checkpoint_name=residual_name,
        # With base 2 the kernel multiplies the queries by log2(e) and rounds them a second time.
        use_base2_exp=False,
        interpret=interpret,
    )
    kernel = library.make_splash_mha_single_device(mask, config=config)
    if fixed_maximum:
        bound = jax.lax.stop_gradient(_bound(query_HLD, key_HKD))
        output = by_head(lambda q, k, v, m: kernel(q, k, v, max_logit_value=m), query_HLD, key_HKD, value_HKD, bound)
    else:
        output = by_head(kernel, query_HLD, key_HKD, value_HKD)
    return rearrange(output[:, :, :query_length], "B N L D -> B L N D")


def _bound(query: jax.Array, key: jax.Array) -> jax.Array:
    """The largest norm of a query times that of a key, float32 `B N`, at most `MAX_FIXED`.

    No score is larger, unless norms allow scores above `MAX_FIXED`: weights of those above 160 overflow then.
    """
    longest_query, longest_key = (
        jnp.sqrt(jnp.max(jnp.sum(jnp.square(array.astype(jnp.float32)), axis=-1), axis=-1)) for array in (query, key)
    )
    return jnp.minimum(longest_query * longest_key, MAX_FIXED)
