"""Adam's moments: float32, or smaller ones: bfloat16, and a second moment of rows and columns."""

from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import optax

from jvgen import nested
from jvgen.nn.network import Parameters
from jvgen.parallel.axes import LAYERS, Axes

FirstMoment = Literal["float32", "bfloat16"]
SecondMoment = Literal["float32", "bfloat16", "factored"]
# Above it a bfloat16 second moment stays where it is: it changes by up to 1 - beta2, and its steps are 0.4 to 0.8%.
LARGEST_BETA2 = 0.98
# Names of the two parts of a factored second moment.
ROWS, COLUMNS = "rows", "columns"
# Of the last two axes of a parameter; smaller ones are not factored, since they would gain little.
SMALLEST_FACTORED = 128


def scale_by_adam(
    axes: Mapping[str, Axes],
    *,
    beta1: float,
    beta2: float,
    epsilon: float,
    first: FirstMoment = "float32",
    second: SecondMoment = "float32",
) -> optax.GradientTransformation:
    """Adam's direction. With float32 moments it is `optax.scale_by_adam`, and so are the names of its state always.

    The sums of a step are float32 and only what is kept for the next step is rounded. A factored second moment is that
    of Adafactor (Shazeer and Stern 2018, arXiv 1804.04235): of each matrix the means over its rows and over its
    columns, whose product over the mean of all stands for the matrix; with Adam's decay and bias correction.

    Args:
      axes: logical axes by path of the parameters; stacked layers are separate matrices.
      first, second: what the moments are kept in; "factored" keeps small parameters (biases, norms) in float32.
    """
    if first == second == "float32":
        return optax.scale_by_adam(b1=beta1, b2=beta2, eps=epsilon)

    def factored(path: str, shape: tuple[int, ...]) -> bool:
        matrix = sum(name != LAYERS for name in axes[path]) >= 2
        return second == "factored" and matrix and min(shape[-2:]) >= SMALLEST_FACTORED

    kept = jnp.bfloat16 if second == "bfloat16" else jnp.float32

    def start(path: str, shape: tuple[int, ...]) -> Any:
        if factored(path, shape):
            return {
                ROWS: jnp.zeros(shape[:-1], jnp.float32),
                COLUMNS: jnp.zeros((*shape[:-2], shape[-1]), jnp.float32),
            }
        return jnp.zeros(shape, kept)

    def init(tree: Parameters) -> optax.ScaleByAdamState:
        flat = nested.flatten(tree)
        mu = {path: jnp.zeros(leaf.shape, first) for path, leaf in flat.items()}
        nu = {path: start(path, leaf.shape) for path, leaf in flat.items()}
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), nested.unflatten(mu), nested.unflatten(nu))

    def update(gradients: Parameters, state: Any, tree: Parameters | None = None) -> tuple[Parameters, Any]:
        count = optax.safe_increment(state.count)
        steps = count.astype(jnp.float32)
        correction1, correction2 = 1 - jnp.float32(beta1) ** steps, 1 - jnp.float32(beta2) ** steps
        old_mu, old_nu = nested.flatten(state.mu), nested.flatten(state.nu)
        directions, mu, nu = {}, {}, {}
        for path, gradient in nested.flatten(gradients).items():
            mean = beta1 * old_mu[path].astype(jnp.float32) + (1 - beta1) * gradient
            square = jnp.square(gradient)
            if factored(path, gradient.shape):
                rows = beta2 * old_nu[f"{path}/{ROWS}"] + (1 - beta2) * jnp.mean(square, axis=-1)
                columns = beta2 * old_nu[f"{path}/{COLUMNS}"] + (1 - beta2) * jnp.mean(square, axis=-2)
                nu[path] = {ROWS: rows, COLUMNS: columns}
                # Divided first: the product of two second moments may be too small for float32.
                share = rows / jnp.maximum(jnp.mean(rows, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
                variance = share[..., :, None] * columns[..., None, :]
            else:
                variance = beta2 * old_nu[path].astype(jnp.float32) + (1 - beta2) * square
                nu[path] = variance.astype(kept)
            mu[path] = mean.astype(first)
            directions[path] = (mean / correction1) / (jnp.sqrt(variance / correction2) + epsilon)
        state = optax.ScaleByAdamState(count, nested.unflatten(mu), nested.unflatten(nu))
        return nested.unflatten(directions), state

    return optax.GradientTransformation(init, update)
