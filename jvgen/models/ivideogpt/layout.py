"""Positions and ids in the token sequence of a clip: index arithmetic, no networks.

    c c ... c  S1 c c ... c   ...   S2 f ... f  S2 f ... f   ...
    frame 0    frame 1              frame T0    frame T0+1

A context frame is `context_tokens` ids, preceded by the slot S1 except in the first frame. A future frame is the slot
S2, to which its action is added, and `future_tokens` ids. Ids: context codes, then future codes, then S1, then S2
(arXiv 2405.15223, section 3.1 and the released code).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Int


@dataclasses.dataclass(frozen=True)
class Layout:
    """The sequence of a clip of `context_frames` + `future_frames` frames.

    Attributes:
      context_frames, future_frames: T0 and F.
      context_tokens, future_tokens: ids per context frame and per future frame.
      context_codes, future_codes: entries of the two codebooks.
    """

    context_frames: int
    future_frames: int
    context_tokens: int
    future_tokens: int
    context_codes: int
    future_codes: int

    @property
    def frames(self) -> int:
        """Frames of the clip."""
        return self.context_frames + self.future_frames

    @property
    def context_slot(self) -> int:
        """The id S1."""
        return self.context_codes + self.future_codes

    @property
    def future_slot(self) -> int:
        """The id S2."""
        return self.context_codes + self.future_codes + 1

    @property
    def vocabulary(self) -> int:
        """Number of ids."""
        return self.context_codes + self.future_codes + 2

    @property
    def prompt_length(self) -> int:
        """Ids before the first S2."""
        return (self.context_tokens + 1) * self.context_frames - 1

    @property
    def frame_length(self) -> int:
        """Ids of a future frame, its slot included."""
        return self.future_tokens + 1

    @property
    def length(self) -> int:
        """Ids of the clip."""
        return self.prompt_length + self.frame_length * self.future_frames

    # Positions, as numpy arrays: constants of a program.

    @property
    def context_positions(self) -> np.ndarray:
        """(T0, context_tokens): positions of the ids of context frames."""
        starts = (self.context_tokens + 1) * np.arange(self.context_frames)
        return starts[:, None] + np.arange(self.context_tokens)

    @property
    def future_slots(self) -> np.ndarray:
        """(F,): positions of the slots S2; the action that leads to the frame is added there."""
        return self.prompt_length + self.frame_length * np.arange(self.future_frames)

    @property
    def future_positions(self) -> np.ndarray:
        """(F, future_tokens): positions of the ids of future frames."""
        return self.future_slots[:, None] + 1 + np.arange(self.future_tokens)

    @property
    def reward_positions(self) -> np.ndarray:
        """(F,): position of the last id of each future frame, whose hidden state predicts the reward of reaching it."""
        return self.future_slots + self.future_tokens

    @property
    def action_frames(self) -> np.ndarray:
        """(F,): the frame whose action leads to each future frame: the one before it."""
        return self.context_frames - 1 + np.arange(self.future_frames)

    @property
    def is_target(self) -> np.ndarray:
        """(length,) bool: ids that are prediction targets: all after the first S2, later slots included."""
        return np.arange(self.length) > self.prompt_length

    @property
    def places(self) -> np.ndarray:
        """(length,): the place of each id in its frame: 0 for S1, 1.. for the ids after it; in future frames, the same
        counted from `future_place`."""
        prompt = np.tile(np.arange(self.context_tokens + 1), self.context_frames)[1:]
        future = np.tile(self.future_place + np.arange(self.frame_length), self.future_frames)
        return np.concatenate([prompt, future])

    @property
    def future_place(self) -> int:
        """The place of S2."""
        return self.context_tokens + 1

    # Ids.

    def flatten(self, context_ids: Int[Array, "B T N"], future_ids: Int[Array, "B F M"]) -> Int[Array, "B L"]:
        """Codebook indices, each counted from 0 within its own codebook, as one sequence.

        Args:
          context_ids: T0 frames.
          future_ids: any number of frames, including 0.
        """
        prompt = self.prompt(context_ids)
        future = jnp.pad(future_ids + self.context_codes, ((0, 0), (0, 0), (1, 0)), constant_values=self.future_slot)
        return jnp.concatenate([prompt, rearrange(future, "b f n -> b (f n)")], axis=1)

    def prompt(self, context_ids: Int[Array, "B T N"]) -> Int[Array, "B P"]:
        """The ids before the first S2."""
        with_slots = jnp.pad(context_ids, ((0, 0), (0, 0), (1, 0)), constant_values=self.context_slot)
        return rearrange(with_slots, "b t n -> b (t n)")[:, 1:]

    def context_ids(self, tokens: Int[Array, "B L"]) -> Int[Array, "B T N"]:
        """Indices into the context codebook, not clamped (as in the released code)."""
        return tokens[:, self.context_positions]

    def future_ids(self, tokens: Int[Array, "B L"]) -> Int[Array, "B F M"]:
        """Indices into the future codebook, clamped: other ids become its first or last entry."""
        return self.clamp_future_codes(tokens[:, self.future_positions])

    def clamp_future_codes(self, ids: Int[Array, "*B"]) -> Int[Array, "*B"]:
        """Ids of the vocabulary to indices into the future codebook, clamped as the released decoder does."""
        return jnp.clip(ids - self.context_codes, 0, self.future_codes - 1)

    def targets(self, tokens: Int[Array, "B L"]) -> tuple[Int[Array, "B M"], slice]:
        """The target ids, and the positions whose hidden states predict them: each one earlier."""
        return tokens[:, self.prompt_length + 1 :], slice(self.prompt_length, self.length - 1)

    def check_ids(self, tokens: np.ndarray | jax.Array) -> None:
        """Raise `ValueError` for ids outside the vocabulary, or a sequence that is neither a prompt nor a clip."""
        tokens = np.asarray(tokens)
        if tokens.shape[-1] not in (self.prompt_length, self.length):
            raise ValueError(
                f"a sequence of {tokens.shape[-1]} ids: {self.context_frames} context frames are {self.prompt_length}, "
                f"{self.future_frames} future frames more {self.length}."
            )
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocabulary:
            raise ValueError(
                f"ids from {low} to {high}: this vocabulary has 0..{self.vocabulary - 1} ({self.context_codes} context "
                f"codes, {self.future_codes} future codes, two slots)."
            )
