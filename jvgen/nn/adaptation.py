"""How the parameters of a network begin that starts from a smaller one."""

import dataclasses
from collections.abc import Callable

import jax


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """How one parameter begins that the other network has in another shape, or not at all.

    Attributes:
      source: its shape in the other network; None if that does not have it.
      make: the parameter from that of the other network or, without a source, from the randomly initialized one; None
        to keep the latter.
    """

    source: tuple[int, ...] | None
    make: Callable[[jax.Array], jax.Array] | None
