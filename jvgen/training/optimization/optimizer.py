"""Optimizers: AdamW, or Muon for matrices with AdamW for the rest; learning-rate schedules, weight decay, freezing."""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jvgen import nested
from jvgen.config import Config, ConfigError
from jvgen.nn.network import Parameters
from jvgen.parallel.axes import LAYERS, VOCABULARY, Axes
from jvgen.training.optimization import moments, parameter_paths
from jvgen.training.optimization.moments import FirstMoment, SecondMoment
from jvgen.training.optimization.muon import Matrices, Muon
from jvgen.value_rules import BelowOne, Bounds, Count, Epsilon, Fraction, Pattern, Positive, Step


@dataclasses.dataclass(frozen=True, kw_only=True)
class LRStage(Config):
    """A scale on the learning rate from a step on, until the next stage.

    Attributes:
      start_step: first step of the stage.
      scale: factor on the learning rate.
      warmup_steps: steps over which the factor changes linearly from that of the stage before; 0 for at once.
    """

    renamed_fields: ClassVar[dict[str, str]] = {"begins": "start_step", "factor": "scale", "rise": "warmup_steps"}

    start_step: Step
    scale: Annotated[float, Bounds(above=0, at_most=1e6)]
    warmup_steps: Step = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Config):
    """One optimizer. Patterns are regular expressions, matched from the start of paths such as "denoiser/out/kernel".

    Attributes:
      kind: "adamw" (Loshchilov and Hutter 2019), or "muon" (Jordan et al. 2024) for kernels and AdamW for the rest.
      learning_rate: peak; for Muon the same rate serves both parts, by `muon_rms`.
      schedule: after the linear warm-up: "constant"; "cosine" or "linear" down to final_fraction at the last step;
        "wsd" (warm-up, stable, decay) constant and then linear down over the last decay_fraction of the run.
      warmup_steps: steps of the linear warm-up from (almost) 0 to the peak; at most all steps of the run.
      final_fraction: learning rate of the last step divided by the peak.
      decay_fraction: fraction of the run in which "wsd" decays.
      stages: scales on the learning rate for parts of the run, in order; see `jvgen.training.optimization.curriculum`.
      beta1, beta2, epsilon: of Adam.
      first_moment: "float32"; "bfloat16" takes 2 bytes less per parameter (also of Muon's momentum).
      second_moment: of Adam: "float32"; "bfloat16" takes 2 bytes less per parameter and needs a beta2 of at most 0.98;
        "factored" keeps means over rows and columns of large matrices only, and takes 4 bytes less.
      weight_decay: decoupled, times the learning rate.
      no_weight_decay: patterns of parameters without weight decay; embeddings (first axis "vocabulary") never decay.
      clip_norm: gradients are scaled down to this global norm; none for no clipping.
      frozen: patterns of parameters that are not trained: no gradient, no moments.
      multipliers: pattern -> factor on the learning rate; the first that matches counts.
      muon_momentum, muon_iterations: momentum and Newton-Schulz iterations.
      muon_rms: root mean square of an orthogonalized update, as Adam's is (Liu et al. 2025, arXiv 2502.16982, §2.2).
      muon_exclude: patterns of kernels that AdamW updates under "muon" (first and last layers, heads).
      muon_blocks: pattern -> number of equal blocks of output features that are matrices of their own, in kernels that
        hold several side by side; the first that matches counts. For shifts, scales and gates of a video DiT:
        {".*_modulation/vectors/projection": 6, ".*/output_modulation": 2}. Queries, keys, values, and the halves of a
        gated feed-forward layer are kernels of their own anyway.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: Annotated[float, Bounds(above=0, at_most=1000, fix="for example 1e-4")] = 1e-4
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "constant"
    warmup_steps: Step = 1000
    final_fraction: Fraction = 0.0
    decay_fraction: Fraction = 0.1
    stages: tuple[LRStage, ...] = ()
    beta1: BelowOne = 0.9
    beta2: BelowOne = 0.95
    epsilon: Epsilon = 1e-8
    first_moment: FirstMoment = "float32"
    second_moment: SecondMoment = "float32"
    weight_decay: Annotated[float, Bounds(at_least=0, at_most=1000)] = 0.01
    no_weight_decay: tuple[Pattern, ...] = (r".*(bias|scale|embedding|positions?|table)$",)
    clip_norm: Annotated[float, Bounds(above=0, fix="none for no clipping")] | None = 1.0
    frozen: tuple[Pattern, ...] = ()
    multipliers: dict[Pattern, Annotated[float, Bounds(at_least=0, at_most=1e6)]] = dataclasses.field(
        default_factory=dict
    )
    muon_momentum: BelowOne = 0.95
    muon_iterations: Annotated[int, Bounds(at_least=1, at_most=100)] = 5
    muon_rms: Positive = 0.2
    muon_exclude: tuple[Pattern, ...] = ()
    muon_blocks: dict[Pattern, Count] = dataclasses.field(default_factory=dict)

    def validate(self) -> None:
        starts = [stage.start_step for stage in self.stages]
        if starts != sorted(set(starts)):
            raise ValueError(f"stages start at steps {starts}: the steps must increase from stage to stage.")
        if self.second_moment == "bfloat16" and self.beta2 > moments.LARGEST_BETA2:
            raise ValueError(
                f"second_moment = bfloat16 with beta2 = {self.beta2}: what a step adds would be rounded away; use "
                f"a beta2 of at most {moments.LARGEST_BETA2}, or factored or float32."
            )


class Optimizer(NamedTuple):
    """The optimizer of one objective; works on a nested dict of its own parameters, without frozen ones.

    Attributes:
      trainable: whether it updates the parameter at a path.
      init: parameters -> optimizer state.
      update: (clipped gradients, state, parameters, learning rate) -> (updates to add, state).
      learning_rate: step (int32 scalar) -> float32 scalar.
      clip_norm: see OptimizerConfig.
    """

    trainable: Callable[[str], bool]
    init: Callable[[Parameters], Any]
    update: Callable[[Parameters, Any, Parameters, jax.Array], tuple[Parameters, Any]]
    learning_rate: Callable[[jax.Array], jax.Array]
    clip_norm: float | None


def make_optimizer(config: OptimizerConfig, axes: Parameters, steps: int, parameters: str = ".*") -> Optimizer:
    """Build the optimizer of one objective.

    Args:
      config: its settings.
      axes: logical axes of all parameters of the trained networks; they tell stacked layers from matrices.
      steps: length of the run.
      parameters: pattern of the parameters of the objective (`Objective.parameters`).

    Raises:
      ConfigError: a `frozen` or `multipliers` pattern that matches no parameter, or nothing left to train.
    """
    for field in ("frozen", "multipliers", "muon_exclude", "muon_blocks"):
        for pattern in parameter_paths.unmatched(tuple(getattr(config, field)), axes):
            paths = list(nested.flatten(axes))
            raise ConfigError(
                f"optimizer.{field}: {pattern!r} matches no parameter (it is matched from the start of the path). "
                f"Paths are such as {', '.join(paths[:3])}."
            )

    def trainable(path: str) -> bool:
        return parameter_paths.matches(parameters, path) and not parameter_paths.matches(config.frozen, path)

    trained_axes = {path: tuple(names) for path, names in nested.flatten(axes).items() if trainable(path)}
    if not trained_axes:
        raise ConfigError(
            f"optimizer.frozen = {config.frozen}: nothing is left to train for the pattern {parameters!r}."
        )
    orthogonalized = {
        path for path, names in trained_axes.items() if config.kind == "muon" and _is_matrix(config, path, names)
    }
    decayed = {path for path, names in trained_axes.items() if _decays(config, path, names)}
    factors = {path: _factor(config, path) for path in trained_axes}
    adam = moments.scale_by_adam(
        trained_axes,
        beta1=config.beta1,
        beta2=config.beta2,
        epsilon=config.epsilon,
        first=config.first_moment,
        second=config.second_moment,
    )
    muon = Muon(
        matrices={path: Matrices(trained_axes[path], _blocks(config, path)) for path in sorted(orthogonalized)},
        momentum=config.muon_momentum,
        iterations=config.muon_iterations,
        rms=config.muon_rms,
        dtype=config.first_moment,
    )

    def init(tree: Parameters) -> Any:
        matrices, rest = nested.split(tree, orthogonalized.__contains__)
        # Without matrices there is no Muon state at all, so that an AdamW checkpoint holds nothing of it.
        return {"adam": adam.init(rest)} | ({"muon": muon.init(matrices)} if orthogonalized else {})

    def update(gradients: Parameters, state: Any, tree: Parameters, learning_rate: jax.Array) -> tuple[Parameters, Any]:
        matrices, rest = nested.split(gradients, orthogonalized.__contains__)
        # Optax raises floats to integer powers, which strict promotion (tests) refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, adam_state = adam.update(rest, state["adam"])
            muon_updates, muon_state = muon.update(matrices, state["muon"]) if orthogonalized else ({}, None)
        state = {**state, "adam": adam_state}
        if orthogonalized:
            updates, state = nested.merge(updates, muon_updates), {**state, "muon": muon_state}
        values = nested.flatten(tree)

        def finish(path: str, direction: jax.Array) -> jax.Array:
            if path in decayed:
                direction = direction + config.weight_decay * values[path]
            return -learning_rate * factors[path] * direction

        return nested.map_with_path(finish, updates), state

    return Optimizer(trainable, init, update, make_schedule(config, steps), config.clip_norm)


def own_optimizer(parameters: str, init: Callable[[Parameters], Any]) -> Optimizer:
    """Of an objective that updates its own parameters (`OwnUpdate`): which these are, and the state it starts with."""

    def trainable(path: str) -> bool:
        return parameter_paths.matches(parameters, path)

    def update(*unused: Any) -> Any:
        raise AssertionError("an objective with an update of its own takes no step of an optimizer")

    return Optimizer(trainable, init, update, update, None)


def make_schedule(config: OptimizerConfig, steps: int) -> Any:
    """Learning rate as a function of the step (0-based int32 scalar), float32."""
    peak, last = config.learning_rate, config.learning_rate * config.final_fraction
    warmup = min(config.warmup_steps, steps)
    decay_start = warmup
    if config.schedule == "wsd":
        decay_start = max(warmup, steps - max(1, round(steps * config.decay_fraction)))
    # The last step is at the end of the decay, also where that is a single step.
    decay_start = max(0, min(decay_start, steps - 2))

    def schedule(step: jax.Array) -> jax.Array:
        position = step.astype(jnp.float32)
        # The first step already has a learning rate above 0: (step + 1) / warmup.
        rising = peak * (position + 1) / max(warmup, 1)
        progress = jnp.clip((position - decay_start) / max(steps - 1 - decay_start, 1), 0, 1)
        if config.schedule == "constant":
            falling = jnp.full_like(progress, peak)
        elif config.schedule == "cosine":
            falling = last + (peak - last) * 0.5 * (1 + jnp.cos(math.pi * progress))
        else:
            falling = peak + (last - peak) * progress
        rate = jnp.where(position < warmup, jnp.minimum(rising, peak), falling)
        return rate * stage_scale(config.stages, position) if config.stages else rate

    return schedule


def stage_scale(stages: tuple[LRStage, ...], position: jax.Array) -> jax.Array:
    """The scale of the stage that a step (float32 scalar) belongs to; 1 before the first stage."""
    scale = jnp.ones_like(position)
    for stage in stages:
        # The first step of a warm-up is already above the start, as in the schedule's warm-up.
        share = jnp.clip((position + 1 - stage.start_step) / max(stage.warmup_steps, 1), 0, 1)
        scale = jnp.where(position < stage.start_step, scale, scale + (stage.scale - scale) * share)
    return scale


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


def _is_matrix(config: OptimizerConfig, path: str, names: Axes) -> bool:
    """Whether Muon applies: kernels of linear layers and convolutions, stacked or not, but no embeddings."""
    return (
        path.endswith("kernel")
        and len(names) - (LAYERS in names) >= 2
        and VOCABULARY not in names
        and not parameter_paths.matches(config.muon_exclude, path)
    )


def _blocks(config: OptimizerConfig, path: str) -> int:
    return next((n for pattern, n in config.muon_blocks.items() if parameter_paths.matches(pattern, path)), 1)


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
