"""Optimizers: AdamW, and Muon for matrices with AdamW for the rest; schedules; what decays, what stands still."""

import dataclasses
import functools
import math
import re
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jvgen import nested
from jvgen.config import Config, ConfigError
from jvgen.nn.network import Parameters
from jvgen.parallel.axes import LAYERS, VOCABULARY, Axes
from jvgen.training.optimization import parameter_paths


@dataclasses.dataclass(frozen=True, kw_only=True)
class RateStage(Config):
    """From the step `begins` on, the learning rate is multiplied by `factor`, reached over `rise` steps."""

    begins: int
    factor: float
    rise: int = 0

    def validate(self) -> None:
        if self.begins < 0 or self.factor <= 0 or self.rise < 0:
            raise ValueError(
                f"begins = {self.begins}, factor = {self.factor}, rise = {self.rise}: a step, a positive factor, and a "
                "number of steps."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Config):
    """One optimizer. Patterns are regular expressions, matched from the start of paths such as "denoiser/out/kernel".

    Attributes:
      kind: "adamw" (Loshchilov and Hutter 2019), or "muon" (Jordan et al. 2024) for kernels and AdamW for the rest.
      learning_rate: peak; for Muon the same rate serves both parts, by `muon_rms`.
      schedule: after the linear warm-up: "constant"; "cosine" or "linear" down to final_fraction at the last step;
        "wsd" (warm-up, stable, decay) constant and then linear down over the last decay_fraction of the run.
      warmup_steps: steps from (almost) 0 to the peak.
      final_fraction: learning rate of the last step over the peak.
      decay_fraction: share of the run that "wsd" decays in.
      stages: factors on the learning rate for parts of the run, in order; see `jvgen.training.optimization.curriculum`.
      beta1, beta2, epsilon: of Adam.
      weight_decay: decoupled, times the learning rate.
      no_weight_decay: patterns of parameters without decay; embeddings (first axis "vocabulary") never decay, heads do.
      clip_norm: gradients are scaled down to this global norm; none for no clipping.
      frozen: patterns of parameters that stand still: no gradient, no moments.
      multipliers: pattern -> factor on the learning rate; the first that matches counts.
      muon_momentum, muon_iterations: momentum and Newton-Schulz iterations.
      muon_rms: root mean square of an orthogonalised update, as Adam's is (Liu et al. 2025, arXiv 2502.16982, §2.2).
      muon_exclude: patterns of kernels that AdamW moves under "muon" (first and last layers, heads).
    """

    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-4
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "constant"
    warmup_steps: int = 1000
    final_fraction: float = 0.0
    decay_fraction: float = 0.1
    stages: tuple[RateStage, ...] = ()
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    no_weight_decay: tuple[str, ...] = (r".*(bias|scale|embedding|positions?|table)$",)
    clip_norm: float | None = 1.0
    frozen: tuple[str, ...] = ()
    multipliers: dict[str, float] = dataclasses.field(default_factory=dict)
    muon_momentum: float = 0.95
    muon_iterations: int = 5
    muon_rms: float = 0.2
    muon_exclude: tuple[str, ...] = ()

    def validate(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate = {self.learning_rate}: must be positive, for example 1e-4.")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps = {self.warmup_steps}: must be 0 or more.")
        for field in ("final_fraction", "decay_fraction"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field} = {getattr(self, field)}: a fraction from 0 to 1.")
        begins = [stage.begins for stage in self.stages]
        if begins != sorted(set(begins)):
            raise ValueError(f"stages begin at steps {begins}: give them in order, each with a step of its own.")
        for field in ("beta1", "beta2", "muon_momentum"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field} = {getattr(self, field)}: must be in [0, 1).")
        if self.epsilon <= 0 or self.weight_decay < 0:
            raise ValueError(
                f"epsilon = {self.epsilon}, weight_decay = {self.weight_decay}: must be positive, and 0 or more."
            )
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm = {self.clip_norm}: must be positive, or none for no clipping.")
        if self.muon_iterations < 1 or self.muon_rms <= 0:
            raise ValueError(
                f"muon_iterations = {self.muon_iterations}, muon_rms = {self.muon_rms}: at least 1, and positive."
            )
        for field in ("no_weight_decay", "frozen", "muon_exclude", "multipliers"):
            for pattern in getattr(self, field):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(f"{field}: {pattern!r} is not a regular expression ({error}).") from error


class Optimizer(NamedTuple):
    """One objective's optimizer over its own parameters, a nested dict without the frozen ones.

    Attributes:
      trains: whether a parameter's path is moved by it.
      init: parameters -> optimizer state.
      update: (gradients, state, parameters, learning rate) -> (updates to add, state); gradients are already clipped.
      learning_rate: step (int32 scalar) -> float32 scalar.
      clip_norm: see OptimizerConfig.
    """

    trains: Any
    init: Any
    update: Any
    learning_rate: Any
    clip_norm: float | None


def make_optimizer(config: OptimizerConfig, axes: Parameters, steps: int, parameters: str = ".*") -> Optimizer:
    """Build the optimizer of one objective.

    Args:
      config: its settings.
      axes: logical axes of all trained parameters; stacked layers are told apart from matrices by them.
      steps: length of the run.
      parameters: pattern of the parameters that the objective moves (`Objective.parameters`).

    Raises:
      ConfigError: a `frozen` or `multipliers` pattern that matches no parameter, or nothing left to train.
    """
    for field in ("frozen", "multipliers", "muon_exclude"):
        for pattern in parameter_paths.unmatched(tuple(getattr(config, field)), axes):
            paths = list(nested.flatten(axes))
            raise ConfigError(
                f"optimizer.{field}: {pattern!r} matches no parameter (it is matched from the start of the path). "
                f"Paths are such as {', '.join(paths[:3])}."
            )

    def trains(path: str) -> bool:
        return parameter_paths.matches(parameters, path) and not parameter_paths.matches(config.frozen, path)

    mine = {path: tuple(names) for path, names in nested.flatten(axes).items() if trains(path)}
    if not mine:
        raise ConfigError(
            f"optimizer.frozen = {config.frozen}: nothing is left to train for the pattern {parameters!r}."
        )
    orthogonalised = {path for path, names in mine.items() if config.kind == "muon" and _is_matrix(config, path, names)}
    decayed = {path for path, names in mine.items() if _decays(config, path, names)}
    factors = {path: _factor(config, path) for path in mine}
    adam = optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon)
    muon = optax.contrib.scale_by_muon(
        beta=config.muon_momentum,
        ns_steps=config.muon_iterations,
        weight_dimension_numbers=functools.partial(nested.map_with_path, lambda path, _: _matrix(mine[path])),
    )

    def init(tree: Parameters) -> Any:
        matrices, rest = nested.split(tree, orthogonalised.__contains__)
        # Without matrices there is no Muon state at all, so that an AdamW checkpoint holds nothing of it.
        return {"adam": adam.init(rest)} | ({"muon": muon.init(matrices)} if orthogonalised else {})

    def update(gradients: Parameters, state: Any, tree: Parameters, learning_rate: jax.Array) -> tuple[Parameters, Any]:
        matrices, rest = nested.split(gradients, orthogonalised.__contains__)
        # Optax raises floats to integer powers, which strict promotion (tests) refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, adam_state = adam.update(rest, state["adam"])
            moved, muon_state = muon.update(matrices, state["muon"]) if orthogonalised else ({}, None)
        state = {**state, "adam": adam_state}
        if orthogonalised:
            moved = nested.map_with_path(lambda path, u: u * _muon_scale(config, u.shape, mine[path]), moved)
            updates, state = nested.merge(updates, moved), {**state, "muon": muon_state}
        values = nested.flatten(tree)

        def finish(path: str, direction: jax.Array) -> jax.Array:
            if path in decayed:
                direction = direction + config.weight_decay * values[path]
            return -learning_rate * factors[path] * direction

        return nested.map_with_path(finish, updates), state

    return Optimizer(trains, init, update, make_schedule(config, steps), config.clip_norm)


def make_schedule(config: OptimizerConfig, steps: int) -> Any:
    """Learning rate as a function of the step (0-based int32 scalar), float32."""
    peak, last = config.learning_rate, config.learning_rate * config.final_fraction
    warmup = min(config.warmup_steps, steps)
    decay_start = warmup
    if config.schedule == "wsd":
        decay_start = max(warmup, steps - max(1, round(steps * config.decay_fraction)))

    def schedule(step: jax.Array) -> jax.Array:
        position = step.astype(jnp.float32)
        # The first step already moves: (step + 1) / warmup.
        rising = peak * (position + 1) / max(warmup, 1)
        progress = jnp.clip((position - decay_start) / max(steps - 1 - decay_start, 1), 0, 1)
        if config.schedule == "constant":
            falling = jnp.full_like(progress, peak)
        elif config.schedule == "cosine":
            falling = last + (peak - last) * 0.5 * (1 + jnp.cos(math.pi * progress))
        else:
            falling = peak + (last - peak) * progress
        rate = jnp.where(position < warmup, jnp.minimum(rising, peak), falling)
        return rate * stage_factor(config.stages, position) if config.stages else rate

    return schedule


def stage_factor(stages: tuple[RateStage, ...], position: jax.Array) -> jax.Array:
    """The factor of the stage that a step (float32 scalar) is in; 1 before the first."""
    factor = jnp.ones_like(position)
    for stage in stages:
        # The first step of a rise has moved already, as in the warm-up.
        share = jnp.clip((position + 1 - stage.begins) / max(stage.rise, 1), 0, 1)
        factor = jnp.where(position < stage.begins, factor, factor + (stage.factor - factor) * share)
    return factor


def global_norm(tree: Any) -> jax.Array:
    """Euclidean norm over all leaves, float32; 0 for an empty tree."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(jnp.sum(jnp.stack(squares))) if squares else jnp.zeros((), jnp.float32)


def clip(gradients: Parameters, norm: jax.Array, limit: float | None) -> Parameters:
    """Scale gradients of this global norm down to the limit; unchanged below it."""
    if limit is None:
        return gradients
    factor = jnp.minimum(1.0, limit / jnp.maximum(norm, limit))
    return jax.tree.map(lambda gradient: gradient * factor, gradients)


def _matrix_axes(names: Axes) -> tuple[int, ...]:
    return tuple(index for index, name in enumerate(names) if name != LAYERS)


def _is_matrix(config: OptimizerConfig, path: str, names: Axes) -> bool:
    """Kernels of linear layers and convolutions, stacked or not; an embedding's rows are not a matrix's."""
    return (
        path.endswith("kernel")
        and len(_matrix_axes(names)) >= 2
        and VOCABULARY not in names
        and not parameter_paths.matches(config.muon_exclude, path)
    )


def _matrix(names: Axes) -> optax.contrib.MuonDimensionNumbers:
    """Input axes (and the window of a convolution) against output features; stacked layers are separate matrices."""
    *inputs, output = _matrix_axes(names)
    return optax.contrib.MuonDimensionNumbers(reduction_axis=tuple(inputs), output_axis=(output,))


def _muon_scale(config: OptimizerConfig, shape: tuple[int, ...], names: Axes) -> float:
    *inputs, output = _matrix_axes(names)
    return config.muon_rms * math.sqrt(max(math.prod(shape[index] for index in inputs), shape[output]))


def _decays(config: OptimizerConfig, path: str, names: Axes) -> bool:
    return (
        config.weight_decay > 0
        and names[:1] != (VOCABULARY,)
        and not parameter_paths.matches(config.no_weight_decay, path)
    )


def _factor(config: OptimizerConfig, path: str) -> float:
    for pattern, factor in config.multipliers.items():
        if parameter_paths.matches(pattern, path):
            return factor
    return 1.0
