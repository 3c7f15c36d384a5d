"""Keys of initial parameters: those of NNX, without its traced counter."""

import jax
import numpy as np
from flax import nnx

from jvgen.nn.parameter_keys import ParameterKeys


def drawn(rngs: nnx.Rngs) -> list[jax.Array]:
    return [jax.random.key_data(rngs.params()) for _ in range(3)]


def test_keys_are_those_of_nnx():
    theirs = drawn(nnx.Rngs(params=3))
    np.testing.assert_array_equal(drawn(ParameterKeys(3)), theirs)
    np.testing.assert_array_equal(drawn(ParameterKeys(jax.random.key(3))), theirs)
    np.testing.assert_array_equal(jax.jit(lambda key: drawn(ParameterKeys(key)))(jax.random.key(3)), theirs)
