"""Keys of a network's initial parameters, quick to trace."""

import itertools

import jax
from flax import nnx


class ParameterKeys(nnx.Rngs):
    """`nnx.Rngs(params=key)`, the same keys in the same order, that counts them in Python.

    NNX writes to an array for each key. Inside a traced function JAX composes two error messages about such an array,
    from all that was traced before, which took most of the time of tracing a large network.

    Args:
      key: typed key, or an integer seed.
    """

    def __init__(self, key: jax.Array | int):
        super().__init__()
        key = jax.random.key(key) if isinstance(key, int) else key
        numbers = itertools.count()
        self.params = nnx.static(lambda: jax.random.fold_in(key, next(numbers)))
