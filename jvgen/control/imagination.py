"""Imagined experience: a world model and a policy in a loop, many sequences in one compiled program.

The policy acts on stacked frames, of which the first are recorded and the others predicted; the world model predicts
the frame that its action leads to and the reward of that action (iVideoGPT, arXiv 2405.15223, section 4.3).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Key, UInt8

from jvgen.control.row_parts import in_parts
from jvgen.control.world_model import row_keys
from jvgen.finite import NotFinite
from jvgen.models.ivideogpt.world import World, WorldWeights
from jvgen.parallel import axes
from jvgen.parallel.rules import Sharding
from jvgen.tasks.pixels import unit_from_uint8, unit_to_uint8

# Purposes of keys: fold_in(key of the call, purpose).
_WORLD, _POLICY = 0, 1

# (parameters, stacked frames uint8 `R H W S*C`, keys `R`) -> actions `R A`.
Policy = Callable[[Any, jax.Array, jax.Array], jax.Array]


class Imagined(NamedTuple):
    """N imagined sequences of F steps.

    Attributes:
      frames: uint8 `N K+F H W C`: the K frames of the start, then the predicted ones.
      actions: `N F A`; action t was chosen at frame K-1+t and leads to frame K+t.
      rewards: of these actions, `N F`.
      finite: bool `N`: no NaN and no infinity in what was predicted or chosen. The other sequences are meaningless.
    """

    frames: UInt8[Array, "N T H W C"]
    actions: Float[Array, "N F A"]
    rewards: Float[Array, "N F"]
    finite: jax.Array


class Imagination:
    """Rolls out a world model with a policy from recorded frames.

    Args:
      world: the structure of a world with actions and rewards.
      policy: chooses actions; pure.
      steps: F.
      stack: S, frames that the policy sees, newest last.
      rows_at_once: sequences in memory at a time, most of which are the keys and values of their tokens; all if None.
      sharding: sequences are split over the batch axes of this mesh; None for one device.
      pixels_scaled_twice: give the policy frames in [0, 1], although it divides by 255, as the released code does.

    Raises:
      ValueError: a world without actions or rewards, or with a goal image; more steps than its horizon.
    """

    def __init__(
        self,
        world: World,
        policy: Policy,
        *,
        steps: int = 10,
        stack: int = 3,
        rows_at_once: int | None = None,
        sharding: Sharding | None = None,
        pixels_scaled_twice: bool = False,
    ):
        check_world(world, steps)
        if stack < 1 or (rows_at_once is not None and rows_at_once < 1):
            raise ValueError(f"stack = {stack}, rows_at_once = {rows_at_once}: at least 1.")
        self.world, self.policy, self.steps, self.stack = world, policy, steps, stack
        self.rows_at_once, self.sharding, self.pixels_scaled_twice = rows_at_once, sharding, pixels_scaled_twice
        self._imagine = jax.jit(self.imagine)

    @property
    def start_frames(self) -> int:
        """K: frames that a sequence starts from."""
        return max(self.stack, self.world.tokenizer.context_frames)

    def __call__(
        self, weights: WorldWeights, policy_parameters: Any, starts: Any, key: Key[Array, ""] | int = 0
    ) -> Imagined:
        """Imagined sequences, on the devices.

        Args:
          weights: of `World.prepare`.
          policy_parameters: what the policy takes first.
          starts: uint8 `N K H W C`, consecutive recorded frames, newest last.
          key: of this call, or a seed: sequence i is a function of it, i and the start.

        Raises:
          ValueError: starts of another shape or dtype.
        """
        side = self.world.tokenizer.resolution
        wanted = (self.start_frames, side, side, self.world.tokenizer.channels)
        if tuple(np.shape(starts))[1:] != wanted or starts.dtype != np.uint8:
            raise ValueError(
                f"starts {starts.dtype} {np.shape(starts)}: expected uint8 (sequences, "
                f"{', '.join(str(size) for size in wanted)}): as many frames as the policy and the world model see."
            )
        key = jax.random.key(key) if isinstance(key, (int, np.integer)) else key
        return self._imagine(weights, policy_parameters, starts, key)

    def imagine(self, weights: WorldWeights, policy_parameters: Any, starts: jax.Array, key: jax.Array) -> Imagined:
        """As a call, without its checks. Pure."""
        count = starts.shape[0]
        keys = tuple(row_keys(jax.random.fold_in(key, purpose), count) for purpose in (_WORLD, _POLICY))
        devices = 1
        if self.sharding is not None:
            batch = self.sharding.config.compute.get(axes.BATCH, ())
            devices = int(np.prod([self.sharding.mesh.shape[axis] for axis in batch], dtype=int))
        with axes.partitioned(self.sharding):
            return in_parts(
                functools.partial(self._sequences, weights, policy_parameters), (starts, *keys), self.rows_at_once,
                devices,
            )  # fmt: skip

    def _sequences(self, weights: WorldWeights, policy_parameters: Any, rows: tuple[jax.Array, ...]) -> Imagined:
        starts, world_keys, policy_keys = jax.tree.map(_split, rows)
        context = unit_from_uint8(starts[:, starts.shape[1] - self.world.tokenizer.context_frames :])
        state = self.world.reset(weights, context, world_keys)
        finite = jnp.ones(starts.shape[0], bool)

        def step(carry: tuple, number: jax.Array) -> tuple[tuple, tuple]:
            state, seen, finite = carry
            shown = rearrange(seen, "n s h w c -> n h w (s c)")
            if self.pixels_scaled_twice:
                shown = unit_from_uint8(shown)
            own = jax.vmap(lambda key: jax.random.fold_in(key, number))(policy_keys)
            actions = self.policy(policy_parameters, shown, own)
            state, frame, rewards = self.world.step(weights, state, actions)
            finite &= jnp.isfinite(rewards) & jnp.all(jnp.isfinite(actions), axis=1)
            finite &= jnp.all(jnp.isfinite(frame), axis=(1, 2, 3))
            # Frames are rounded before the policy sees them: it is trained on what is stored.
            frame = _split(unit_to_uint8(frame))
            return (state, jnp.concatenate([seen[:, 1:], frame[:, None]], axis=1), finite), (frame, actions, rewards)

        carry = (state, starts[:, starts.shape[1] - self.stack :], finite)
        (_, _, finite), made = jax.lax.scan(step, carry, jnp.arange(self.steps))
        frames, actions, rewards = (jnp.swapaxes(array, 0, 1) for array in made)
        return Imagined(jnp.concatenate([starts, frames], axis=1), actions, rewards, finite)


def check_world(world: World, steps: int) -> None:
    """Raise `ValueError` for a world in which `steps` steps with a policy and rewards cannot be imagined."""
    if not world.transformer.action_width:
        raise ValueError("this world takes no actions: a policy needs a model with action_width above 0.")
    if not world.transformer.reward:
        raise ValueError(
            "this world predicts no rewards: a policy is trained on them; train the model with "
            "task.transformer.reward = true, on recordings that have rewards."
        )
    if world.goal:
        raise ValueError("this world was trained with a goal image in its context: imagination starts from recordings.")
    horizon = world.layout.future_frames
    if not 1 <= steps <= horizon:
        raise ValueError(
            f"steps = {steps}: this world predicts 1..{horizon} frames after its context; imagine fewer, or give the "
            "world more frames."
        )


def check_finite(imagined: Imagined) -> None:
    """Raise `NotFinite` if sequences hold NaN or infinity; waits for them."""
    finite = np.asarray(imagined.finite)
    if not finite.all():
        raise NotFinite(
            f"{int(np.sum(~finite))} of {len(finite)} imagined sequences hold NaN or infinity: the world model's or "
            "the policy's weights are damaged, or their training has diverged."
        )


def _split(rows: jax.Array) -> jax.Array:
    if jnp.issubdtype(rows.dtype, jax.dtypes.prng_key):
        return rows
    return axes.constrain(rows, axes.BATCH, *[None] * (rows.ndim - 1))
