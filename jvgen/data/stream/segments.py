"""Segments: examples whose frames are drawn from a longer window instead of being consecutive at one stride."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np

from jvgen.config import Config
from jvgen.value_rules import Bounds, CountOrZero


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentConfig(Config):
    """Training frames of iVideoGPT's tokenizer (arXiv 2405.15223, appendix A.3, and its released code).

    A window of `horizon` frames at the bucket's stride is placed as for any bucket. The example has

    * "later": the first `context` frames, then frames drawn without replacement from all recorded ones after them
      (including those that the stride skips), in temporal order;
    * "shuffled": frames drawn from the window without replacement, in random order.

    Such examples have no actions and rewards: their frames are not consecutive.

    Attributes:
      choice: how frames are drawn, see above.
      horizon: number of frames of the window.
      context: number of leading frames that are always kept ("later").
    """

    choice: Literal["later", "shuffled"]
    horizon: Annotated[int, Bounds(at_least=2, at_most=100_000)]
    context: CountOrZero = 0

    def validate(self) -> None:
        if self.context >= self.horizon:
            raise ValueError(f"context = {self.context}: from 0 up to horizon = {self.horizon}.")
        if self.choice == "later" and self.context < 1:
            raise ValueError("context = 0: 'later' needs at least 1 context frame.")

    def check(self, frames: int) -> None:
        """Raise `ValueError` unless examples of `frames` frames can be drawn from any recording."""
        if not self.context < frames <= self.horizon:
            raise ValueError(
                f"frames = {frames}: a segment with context = {self.context} and horizon = {self.horizon} gives "
                f"{self.context + 1}..{self.horizon} frames."
            )

    def frames(self, count: int, start: int, stride: int, uniforms: Sequence[float]) -> tuple[int, ...]:
        """Recorded frame numbers of an example of `count` frames.

        Args:
          start, stride: of the window.
          uniforms: at least `count` numbers in [0, 1); empty for evenly spaced frames (evaluation).
        """
        window = start + stride * np.arange(self.horizon)
        kept, candidates = window[: self.context], window
        if self.choice == "later":
            candidates = np.arange(kept[-1] + 1, window[-1] + 1)
        else:
            kept = window[:0]
        wanted = count - len(kept)
        if not len(uniforms):
            drawn = candidates[np.linspace(0, len(candidates) - 1, wanted).round().astype(int)]
        else:
            drawn = candidates[_distinct(len(candidates), uniforms[:wanted])]
        if self.choice == "later":
            drawn = np.sort(drawn)
        return tuple(int(frame) for frame in (*kept, *drawn))


def _distinct(size: int, uniforms: Sequence[float]) -> list[int]:
    """`len(uniforms)` distinct indices below `size`: the head of a Fisher-Yates shuffle."""
    order = list(range(size))
    for place, uniform in enumerate(uniforms):
        other = place + int(uniform * (size - place))
        order[place], order[other] = order[other], order[place]
    return order[: len(uniforms)]
