"""DrQ-v2 (Yarats et al. 2021, arXiv 2107.09645): an actor and two critics on shifted frames, as iVideoGPT uses it.

Everything is a pure function of `AgentState`, a batch and a key. With the published settings one update has the
published numbers (weights, losses, gradients: `tests/unit/test_drq_v2.py`).
"""

import dataclasses
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int, Key, UInt8

from jvgen.config import Config
from jvgen.control.replay import Transitions
from jvgen.nn.conv import Conv2d
from jvgen.nn.linear import Linear
from jvgen.nn.network import Network, Parameters
from jvgen.nn.norm import LayerNorm
from jvgen.parallel.axes import BATCH, constrain
from jvgen.value_rules import Bounds, Count, Epsilon, Fraction, Positive, Steps, Weight, Width

# Purposes of keys: fold_in(key of the update, purpose).
_SHIFT, _NEXT_SHIFT, _NEXT_ACTION, _ACTION = range(4)
# Actions stay this far from their bounds, so that the straight-through gradient of the clamp is one.
_MARGIN = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrQV2Config(Config):
    """The agent. Defaults are those of iVideoGPT's experiments on Meta-World, which differ from DrQ-v2's where stated.

    Attributes:
      frame_stack: frames per observation.
      channels: of the encoder's convolutions.
      features: width of the trunks of actor and critic.
      hidden: width of their hidden layers.
      learning_rate: of Adam, for encoder, actor and critics.
      weight_decay: times the parameters, added to their gradients; 0 in DrQ-v2.
      target_rate: of the target critics' moving average per update.
      steps: n of the n-step return.
      discount: per step.
      noise_start, noise_end: standard deviation of exploration, linear from one to the other.
      noise_steps: over this many steps of the agent; 500,000 and more in DrQ-v2 for harder tasks.
      noise_limit: of the noise in updates.
      pad: largest shift of frames, in pixels.
      batch_size: transitions per update.
      updates_per_step: of the agent; one every two in DrQ-v2.
      random_steps: of the agent at the start, with uniform actions.
    """

    frame_stack: Count = 3
    channels: Width = 32
    features: Width = 50
    hidden: Width = 1024
    learning_rate: Positive = 1e-4
    weight_decay: Weight = 1e-6
    target_rate: Epsilon = 0.01
    steps: Annotated[int, Bounds(at_least=1, at_most=1000)] = 3
    discount: Fraction = 0.99
    noise_start: Weight = 1.0
    noise_end: Weight = 0.1
    noise_steps: Steps = 100_000
    noise_limit: Positive = 0.3
    pad: Annotated[int, Bounds(at_least=0, at_most=1000)] = 4
    batch_size: Count = 256
    updates_per_step: Count = 2
    random_steps: Annotated[int, Bounds(at_least=0)] = 2000

    def noise(self, step: jax.Array | int) -> jax.Array:
        """Standard deviation of exploration at a step of the agent, float32."""
        share = jnp.clip(jnp.asarray(step, jnp.float32) / self.noise_steps, 0.0, 1.0)
        return (1 - share) * self.noise_start + share * self.noise_end


class Encoder(nnx.Module):
    """Four convolutions without padding, the first with stride 2: uint8 `B H W C` to `B features`, float32."""

    def __init__(self, channels_in: int, channels: int, *, rngs: nnx.Rngs):
        options = {"padding": ((0, 0), (0, 0)), "kernel_init": _orthogonal_windows, "axes": (None, None), "rngs": rngs}
        self.layers = nnx.List(
            [
                Conv2d(channels if layer else channels_in, channels, strides=(1, 1) if layer else (2, 2), **options)
                for layer in range(4)
            ]
        )

    def __call__(self, frames: Array) -> Float[Array, "B C"]:
        x = constrain(frames.astype(jnp.float32) / 255.0 - 0.5, BATCH, None, None, None)
        for layer in self.layers:
            x = jax.nn.relu(layer(x))
        return rearrange(x, "b h w c -> b (h w c)")


class Trunk(nnx.Module):
    """Linear, LayerNorm, tanh."""

    def __init__(self, features_in: int, features: int, *, rngs: nnx.Rngs):
        self.linear = _linear(features_in, features, rngs)
        self.norm = LayerNorm(features, epsilon=1e-5)

    def __call__(self, x: Float[Array, "B I"]) -> Float[Array, "B C"]:
        return jnp.tanh(self.norm(self.linear(x)))


class Perceptron(nnx.Module):
    """Three linear layers with ReLU between them."""

    def __init__(self, features_in: int, hidden: int, features_out: int, *, rngs: nnx.Rngs):
        widths = (features_in, hidden, hidden, features_out)
        self.layers = nnx.List([_linear(a, b, rngs) for a, b in zip(widths[:-1], widths[1:], strict=True)])

    def __call__(self, x: Float[Array, "B I"]) -> Float[Array, "B O"]:
        *hidden, last = self.layers
        for layer in hidden:
            x = jax.nn.relu(layer(x))
        return last(x)


class Actor(nnx.Module):
    """Encoded frames to the mean action, in (-1, 1)."""

    def __init__(self, encoded: int, action_width: int, config: DrQV2Config, *, rngs: nnx.Rngs):
        self.trunk = Trunk(encoded, config.features, rngs=rngs)
        self.policy = Perceptron(config.features, config.hidden, action_width, rngs=rngs)

    def __call__(self, encoded: Float[Array, "B C"]) -> Float[Array, "B A"]:
        return jnp.tanh(self.policy(self.trunk(encoded)))


class Critic(nnx.Module):
    """Encoded frames and actions to two values, `2 B`."""

    def __init__(self, encoded: int, action_width: int, config: DrQV2Config, *, rngs: nnx.Rngs):
        self.trunk = Trunk(encoded, config.features, rngs=rngs)
        width = config.features + action_width
        self.values = nnx.List([Perceptron(width, config.hidden, 1, rngs=rngs) for _ in range(2)])

    def __call__(self, encoded: Float[Array, "B C"], actions: Float[Array, "B A"]) -> Float[Array, "2 B"]:
        x = jnp.concatenate([self.trunk(encoded), actions], axis=-1)
        return jnp.stack([value(x)[:, 0] for value in self.values])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AgentState:
    """All that changes in training.

    Attributes:
      parameters: of "encoder", "actor" and "critic".
      target: of the target critics.
      optimizer: Adam's state of each of the three.
      updates: int32 scalar, how many were made.
    """

    parameters: dict[str, Parameters]
    target: Parameters
    optimizer: dict[str, optax.OptState]
    updates: jax.Array


class Randomness(NamedTuple):
    """The random numbers of one update: shifts in pixels `B 2` (y, x) in 0..2 pad, and standard normal noise `B A`."""

    shift: Int[Array, "B 2"]
    next_shift: Int[Array, "B 2"]
    next_noise: Float[Array, "B A"]
    noise: Float[Array, "B A"]


class DrQV2:
    """The agent's networks and its pure functions.

    Args:
      config: of the agent.
      frame: shape of one frame, (H, W, C).
      action_width: components of an action; each is in [-1, 1].

    Raises:
      ValueError: frames too small for the encoder.
    """

    def __init__(self, config: DrQV2Config, frame: tuple[int, int, int], action_width: int):
        config.validate()
        height, width, channels = frame
        sides = [(side - 3) // 2 + 1 - 6 for side in (height, width)]
        if min(sides) < 1:
            raise ValueError(f"frames of {height}x{width}: the encoder needs 15x15 pixels or more.")
        self.config, self.frame, self.action_width = config, frame, action_width
        encoded = sides[0] * sides[1] * config.channels
        stacked = channels * config.frame_stack
        self.networks = {
            "encoder": Network.of(lambda rngs: Encoder(stacked, config.channels, rngs=rngs)),
            "actor": Network.of(lambda rngs: Actor(encoded, action_width, config, rngs=rngs)),
            "critic": Network.of(lambda rngs: Critic(encoded, action_width, config, rngs=rngs)),
        }
        self.optimizer = optax.chain(
            optax.add_decayed_weights(config.weight_decay), optax.adam(config.learning_rate, eps=1e-8)
        )

    def forward_flops(self) -> float:
        """Of encoder, actor and critics for one observation, an addition and a multiplication counted as two."""
        config, (height, width, channels) = self.config, self.frame
        total, channels, sides = 0, channels * config.frame_stack, (height, width)
        for layer in range(4):
            sides = tuple((side - 3) // (1 if layer else 2) + 1 for side in sides)
            total += sides[0] * sides[1] * 9 * channels * config.channels
            channels = config.channels
        encoded = sides[0] * sides[1] * channels
        hidden, features = config.hidden, config.features
        actor = encoded * features + hidden * (features + hidden + self.action_width)
        critics = encoded * features + 2 * hidden * (features + self.action_width + hidden + 1)
        return 2.0 * (total + actor + critics)

    def init(self, key: Key[Array, ""]) -> AgentState:
        """Random parameters: orthogonal matrices, zero biases."""
        parameters = {
            name: network.init(jax.random.fold_in(key, number))
            for number, (name, network) in enumerate(self.networks.items())
        }
        optimizer = {name: self.optimizer.init(value) for name, value in parameters.items()}
        target = jax.tree.map(jnp.copy, parameters["critic"])
        return AgentState(parameters, target, optimizer, jnp.zeros((), jnp.int32))

    def act(
        self,
        parameters: dict[str, Parameters],
        frames: Array,
        noise: Float[Array, "B A"] | None = None,
    ) -> Float[Array, "B A"]:
        """Actions for stacked frames `B H W S*C`, uint8 or floats in 0..255: the mean, plus noise where it is given."""
        encoded = self.networks["encoder"].apply(parameters["encoder"], frames)
        mean = self.networks["actor"].apply(parameters["actor"], encoded)
        return mean if noise is None else _clamped(mean + noise)

    def randomness(self, key: Key[Array, ""], batch: int) -> Randomness:
        """The random numbers of one update, from its key."""
        keys = [jax.random.fold_in(key, purpose) for purpose in (_SHIFT, _NEXT_SHIFT, _NEXT_ACTION, _ACTION)]
        shifts = (jax.random.randint(each, (batch, 2), 0, 2 * self.config.pad + 1) for each in keys[:2])
        noises = (jax.random.normal(each, (batch, self.action_width)) for each in keys[2:])
        return Randomness(*shifts, *noises)

    def update(
        self,
        state: AgentState,
        batch: Transitions,
        noise_scale: Float[Array, ""] | float,
        random: Randomness,
    ) -> tuple[AgentState, dict[str, jax.Array]]:
        """One update of critics and encoder, then of the actor, then of the target critics.

        Args:
          state: before it.
          batch: transitions, arrays on devices.
          noise_scale: standard deviation of exploration at this step (`DrQV2Config.noise`).
          random: see `randomness`.

        Returns:
          The state after it, and scalars: critic_loss, actor_loss, value, target_value, reward.
        """
        config, networks = self.config, self.networks
        frames = shifted(batch.frames, random.shift, config.pad)
        next_frames = shifted(batch.next_frames, random.next_shift, config.pad)
        parameters, optimizer = dict(state.parameters), dict(state.optimizer)

        def explore(actor: Parameters, encoded: jax.Array, noise: jax.Array) -> jax.Array:
            scaled = jnp.clip(noise_scale * noise, -config.noise_limit, config.noise_limit)
            return _clamped(networks["actor"].apply(actor, encoded) + scaled)

        after = networks["encoder"].apply(parameters["encoder"], next_frames)
        next_actions = explore(parameters["actor"], after, random.next_noise)
        next_value = jnp.min(networks["critic"].apply(state.target, after, next_actions), axis=0)
        target_value = jax.lax.stop_gradient(batch.rewards + batch.discounts * next_value)

        def critic_loss(trained: dict[str, Parameters]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            encoded = networks["encoder"].apply(trained["encoder"], frames)
            values = networks["critic"].apply(trained["critic"], encoded, batch.actions)
            return jnp.sum(jnp.mean(jnp.square(values - target_value), axis=1)), (encoded, values)

        trained = {name: parameters[name] for name in ("encoder", "critic")}
        (loss_of_critic, (encoded, values)), gradients = jax.value_and_grad(critic_loss, has_aux=True)(trained)
        for name in trained:
            parameters[name], optimizer[name] = self._step(parameters[name], optimizer[name], gradients[name])

        # The features are those from before the encoder's step; the critics have made theirs.
        encoded = jax.lax.stop_gradient(encoded)

        def actor_loss(actor: Parameters) -> jax.Array:
            actions = explore(actor, encoded, random.noise)
            return -jnp.mean(jnp.min(networks["critic"].apply(parameters["critic"], encoded, actions), axis=0))

        loss_of_actor, gradient = jax.value_and_grad(actor_loss)(parameters["actor"])
        parameters["actor"], optimizer["actor"] = self._step(parameters["actor"], optimizer["actor"], gradient)
        rate = config.target_rate
        target = jax.tree.map(lambda new, old: rate * new + (1 - rate) * old, parameters["critic"], state.target)
        metrics = {
            "critic_loss": loss_of_critic,
            "actor_loss": loss_of_actor,
            "value": jnp.mean(values),
            "target_value": jnp.mean(target_value),
            "reward": jnp.mean(batch.rewards),
        }
        return AgentState(parameters, target, optimizer, state.updates + 1), metrics

    def _step(
        self, parameters: Parameters, state: optax.OptState, gradient: Parameters
    ) -> tuple[Parameters, optax.OptState]:
        # Optax raises floats to integer powers, which strict promotion (tests) refuses.
        with jax.numpy_dtype_promotion("standard"):
            changes, state = self.optimizer.update(gradient, state, parameters)
        return optax.apply_updates(parameters, changes), state


def shifted(
    frames: UInt8[Array, "B H W C"] | Float[Array, "B H W C"], shift: Int[Array, "B 2"], pad: int
) -> Float[Array, "B H W C"]:
    """Frames moved by whole pixels, their edges repeated: `shift` (y, x) of each in 0..2 pad, `pad` leaves it in place.

    The published code interpolates at exactly these pixels.
    """
    _, height, width, channels = frames.shape
    padded = jnp.pad(frames.astype(jnp.float32), ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="edge")

    def crop(frame: jax.Array, at: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(frame, (at[0], at[1], jnp.zeros((), at.dtype)), (height, width, channels))

    return jax.vmap(crop)(padded, shift)


def _clamped(actions: Float[Array, "B A"]) -> Float[Array, "B A"]:
    """Actions within their bounds, with the gradient of the identity."""
    inside = jnp.clip(actions, -1 + _MARGIN, 1 - _MARGIN)
    return actions + jax.lax.stop_gradient(inside - actions)


def _linear(features_in: int, features_out: int, rngs: nnx.Rngs) -> Linear:
    return Linear(features_in, features_out, axes=(None, None), kernel_init=nnx.initializers.orthogonal(), rngs=rngs)


def _orthogonal_windows(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Orthogonal convolution kernels with the gain of ReLU, as torch: output channels against all the rest."""
    flat = nnx.initializers.orthogonal(np.sqrt(2.0))(key, (shape[-1], int(np.prod(shape[:-1]))), dtype)
    return rearrange(flat, "o (i h w) -> h w i o", h=shape[0], w=shape[1])
