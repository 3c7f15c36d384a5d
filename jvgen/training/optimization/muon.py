"""Muon (Jordan et al. 2024): the momentum of each matrix, orthogonalized by Newton-Schulz iterations.

State, momentum and iterations are those of `optax.contrib.scale_by_muon`. Two things are added: a kernel may hold
several matrices side by side (blocks of output features), and on a mesh each device orthogonalizes its share of the
matrices of a stack, or its share of a single matrix, instead of all devices all of them.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jvgen import nested
from jvgen.config import ConfigError
from jvgen.nn.network import Parameters
from jvgen.parallel.axes import LAYERS, Axes, current
from jvgen.parallel.rules import Sharding

EPSILON = 1e-8


@dataclasses.dataclass(frozen=True)
class Matrices:
    """The matrices that a kernel holds.

    Attributes:
      names: logical axes of the kernel; the last is that of output features, `layers` is a stack.
      blocks: number of equal blocks of output features, each a matrix of its own.
    """

    names: Axes
    blocks: int = 1

    def split(self, path: str, kernel: jax.Array) -> Float[Array, "N I O"]:
        """One matrix per layer and block: input features (with the window of a convolution) by output features."""
        stacked = kernel if LAYERS in self.names else kernel[None]
        if stacked.shape[-1] % self.blocks:
            raise ConfigError(
                f"optimizer.muon_blocks: {path} has {stacked.shape[-1]} output features, which {self.blocks} blocks do "
                "not divide."
            )
        flat = stacked.reshape(stacked.shape[0], -1, stacked.shape[-1])
        return rearrange(flat, "l i (b o) -> (l b) i o", b=self.blocks)

    def join(self, matrices: Float[Array, "N I O"], shape: tuple[int, ...]) -> jax.Array:
        """The inverse of `split` for a kernel of this shape."""
        return rearrange(matrices, "(l b) i o -> l i (b o)", b=self.blocks).reshape(shape)

    def scale(self, shape: tuple[int, ...]) -> float:
        """Factor that gives an orthogonal update of a kernel of this shape a root mean square of one."""
        *inputs, outputs = (size for size, name in zip(shape, self.names, strict=True) if name != LAYERS)
        return math.sqrt(max(math.prod(inputs), outputs // self.blocks))


@dataclasses.dataclass(frozen=True)
class Muon:
    """Muon for a nested dict of kernels.

    Attributes:
      matrices: what each kernel holds, by path.
      momentum, iterations: of the optimizer.
      rms: root mean square of the updates (Liu et al. 2025, arXiv 2502.16982, §2.2).
      dtype: of the momentum in the state; it is computed in float32.
    """

    matrices: Mapping[str, Matrices]
    momentum: float
    iterations: int
    rms: float
    dtype: str = "float32"

    def init(self, kernels: Parameters) -> optax.contrib.MuonState:
        """The first state: momentum of zeros."""
        first = optax.contrib.scale_by_muon(
            beta=self.momentum, ns_steps=self.iterations, mu_dtype=None if self.dtype == "float32" else self.dtype
        )
        return first.init(kernels)

    def update(
        self, gradients: Parameters, state: optax.contrib.MuonState
    ) -> tuple[Parameters, optax.contrib.MuonState]:
        """Directions to step against, and the next state."""
        beta, count = self.momentum, (state.count + 1).astype(jnp.float32)
        momentum = jax.tree.map(lambda m, g: beta * m.astype(jnp.float32) + (1 - beta) * g, state.mu, gradients)
        ahead, now = 1 - beta ** (count + 1), 1 - beta**count
        # Nesterov's: one more step of the momentum, each part with its correction of the bias to zero.
        looked_ahead = jax.tree.map(lambda m, g: beta * (m / ahead) + (1 - beta) * (g / now), momentum, gradients)

        def direction(path: str, kernel: jax.Array) -> jax.Array:
            held = self.matrices[path]
            stack = held.split(path, kernel)
            found = _owned(
                stack,
                lambda some: orthogonalize(some, state.ns_coeffs, self.iterations),
                _stored(held.names, kernel.shape, stack.shape),
            )
            return held.join(found, kernel.shape) * (self.rms * held.scale(kernel.shape))

        updates = nested.map_with_path(direction, looked_ahead)
        momentum = jax.tree.map(lambda m: m.astype(self.dtype), momentum)
        return updates, state._replace(count=state.count + 1, mu=momentum)


def orthogonalize(matrices: Float[Array, "N I O"], coefficients: Float[Array, "3"], iterations: int) -> jax.Array:
    """Each matrix with singular values near one (about 0.7 to 1.2), and its singular vectors."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + EPSILON)
    a, b, c = coefficients

    def iteration(_: jax.Array, x: jax.Array) -> jax.Array:
        # The precision is that which the step sets for the whole update.
        square = jnp.einsum("nic,njc->nij", x, x, precision=None)
        quintic = b * square + c * jnp.einsum("nij,njk->nik", square, square, precision=None)
        return a * x + jnp.einsum("nij,njc->nic", quintic, x, precision=None)

    # A loop of the program: one iteration is compiled, and not all of them.
    x = jax.lax.fori_loop(0, iterations, iteration, x)
    return x.mT if tall else x


def _owned(
    stack: Float[Array, "N I O"], function: Callable[[jax.Array], jax.Array], stored: NamedSharding | None
) -> Float[Array, "N I O"]:
    """A function of a stack of matrices, with whole matrices on each device, and each on as few as the mesh allows.

    Nothing is gathered: an all-to-all per mesh axis brings each device the rest of its own matrices, and takes the
    results back. A stack that the number of devices does not divide is filled up with zeros.

    Args:
      stored: the sharding of the stack in the optimizer's state; None on one device.
    """
    count = stack.shape[0]
    if stored is None:
        return function(stack)
    if count == 1:
        return _by_longer_side(stack, function, stored)
    mesh, (_, rows, columns) = stored.mesh, (_entry(entry) for entry in stored.spec)
    owners = tuple(axis for axis in mesh.axis_names if axis not in (*rows, *columns) and mesh.shape[axis] > 1)
    split = math.prod(mesh.shape[axis] for axis in (*rows, *columns))
    # Devices beyond one for each matrix would only repeat what others do.
    while owners and split * math.prod(mesh.shape[axis] for axis in owners[1:]) >= count:
        owners = owners[1:]
    # One axis moves at a time, so that each step is one all-to-all; the first splits what all devices have.
    places = [(owners, rows, columns)]
    while rows or columns:
        axis, rows, columns = (rows[0], rows[1:], columns) if rows else (columns[0], rows, columns[1:])
        owners = (*owners, axis)
        places.append((owners, rows, columns))
    devices = math.prod(mesh.shape[axis] for axis in owners)
    stack = jnp.pad(stack, ((0, -count % devices), (0, 0), (0, 0)))
    return _moved(stack, function, stored, places)[:count]


def _by_longer_side(
    matrix: Float[Array, "1 I O"], function: Callable[[jax.Array], jax.Array], stored: NamedSharding
) -> Float[Array, "1 I O"]:
    """A function of one matrix, split by its longer side alone: of the products of an iteration, devices have to sum
    the square of the shorter side, and never have the matrix whole."""
    _, rows, columns = (_entry(entry) for entry in stored.spec)
    tall = matrix.shape[1] > matrix.shape[2]
    longer, shorter = (rows, columns) if tall else (columns, rows)
    if max(matrix.shape[1:]) % math.prod(stored.mesh.shape[axis] for axis in (*longer, *shorter)):
        return function(matrix)
    places = []
    while shorter:
        longer, shorter = (*longer, shorter[0]), shorter[1:]
        places.append(((), longer, shorter) if tall else ((), shorter, longer))
    return _moved(matrix, function, stored, places)


def _moved(
    stack: Float[Array, "N I O"],
    function: Callable[[jax.Array], jax.Array],
    stored: NamedSharding,
    places: Sequence[tuple[tuple[str, ...], ...]],
) -> Float[Array, "N I O"]:
    """A function of a stack at the last of some places, given by mesh axes per dimension, and back the same way."""
    steps = [NamedSharding(stored.mesh, PartitionSpec(*(entry or None for entry in place))) for place in places]
    for step in (stored, *steps):
        stack = jax.lax.with_sharding_constraint(stack, step)
    stack = function(stack)
    for step in (*reversed(steps), stored):
        stack = jax.lax.with_sharding_constraint(stack, step)
    return stack


def _stored(names: Axes, kernel: tuple[int, ...], stack: tuple[int, ...]) -> NamedSharding | None:
    """The storage sharding of a kernel, as that of its stack of matrices; None without a mesh."""
    sharding = current()
    if not isinstance(sharding, Sharding) or sharding.mesh.size == 1:
        return None
    place = sharding.storage_of(names, kernel)
    entries = [_entry(entry) for entry in (*place.spec, *(None,) * (len(kernel) - len(place.spec)))]
    if len(kernel) - (LAYERS in names) > 2:
        # The window of a convolution is merged with its input features.
        entries = [(), ()]
    spec: list[tuple[str, ...] | None] = [None]
    for entry, size in zip(entries[-2:], stack[1:], strict=True):
        spec.append(entry if size % math.prod(place.mesh.shape[axis] for axis in entry) == 0 else ())
    return NamedSharding(place.mesh, PartitionSpec(*spec))


def _entry(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()
