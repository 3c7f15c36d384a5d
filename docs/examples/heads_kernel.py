"""A kernel of one's own: attention one head at a time; compared with the reference in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np

from jvgen.kernels.attention import reference


def attention(query: jax.Array, key: jax.Array, value: jax.Array, *, scale: float) -> jax.Array:
    """The function of `reference.attention`, with the scores of one head in memory at a time: `B L N D`."""

    def one_head(arrays: tuple[jax.Array, ...]) -> jax.Array:
        q, k, v = (array[:, :, None] for array in arrays)
        return reference.attention(q, k, v, scale=scale)[:, :, 0]

    heads = jax.tree.map(lambda array: jnp.moveaxis(array, 2, 0), (query, key, value))
    return jnp.moveaxis(jax.lax.map(jax.checkpoint(one_head), heads), 0, 2)


def largest_differences() -> tuple[float, float]:
    """From the reference: of the output, and of the gradients of queries, keys and values."""
    rng = np.random.default_rng(0)
    query, key, value, weight = (jnp.asarray(rng.standard_normal((1, 12, 3, 8)), jnp.float32) for _ in range(4))

    def total(kernel, *arrays: jax.Array) -> jax.Array:
        return jnp.sum(weight * kernel(*arrays, scale=8**-0.5))

    def both(kernel) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        gradients = jax.grad(lambda *arrays: total(kernel, *arrays), argnums=(0, 1, 2))
        return kernel(query, key, value, scale=8**-0.5), gradients(query, key, value)

    ours, theirs = jax.jit(lambda: (both(attention), both(reference.attention)))()
    differences = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), ours, theirs)
    return differences[0], max(differences[1])
