"""Which frames of a recording make an example, where these are not simply every nth frame from some start on."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from jvgen.config import Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentConfig(Config):
    """Frames that iVideoGPT's tokenizer is trained on (arXiv 2405.15223, appendix A.3, and its released code).

    A window of `horizon` frames at the bucket's stride is placed as for any bucket. Of it the example has

    * "later": the first `context` frames, then frames drawn from all recorded ones after them (also those that the
      stride leaves out), each at most once, in order;
    * "shuffled": frames drawn from the window, each at most once, in the order in which they are drawn.

    Actions and rewards of such examples are left out: their frames do not follow on each other.

    Attributes:
      choice: see above.
      horizon: frames of the window.
      context: frames that are not drawn.
    """

    choice: Literal["later", "shuffled"]
    horizon: int
    context: int = 0

    def validate(self) -> None:
        if self.horizon < 2:
            raise ValueError(f"horizon = {self.horizon}: a window of at least 2 frames.")
        if not 0 <= self.context < self.horizon:
            raise ValueError(f"context = {self.context}: from 0 up to horizon = {self.horizon}.")
        if self.choice == "later" and self.context < 1:
            raise ValueError("context = 0: 'later' needs at least 1 frame that the others come after.")

    def check(self, frames: int) -> None:
        """Raise `ValueError` unless examples of so many frames can be drawn, from any recording."""
        if not self.context < frames <= self.horizon:
            raise ValueError(
                f"frames = {frames}: a segment with context = {self.context} and horizon = {self.horizon} gives "
                f"{self.context + 1}..{self.horizon} frames."
            )

    def frames(self, count: int, start: int, stride: int, numbers: Sequence[float]) -> tuple[int, ...]:
        """Recorded frame numbers of an example of `count` frames.

        Args:
          start, stride: of the window.
          numbers: at least `count` numbers in [0, 1); empty for the same spread-out choice every time.
        """
        window = start + stride * np.arange(self.horizon)
        kept, candidates = window[: self.context], window
        if self.choice == "later":
            candidates = np.arange(kept[-1] + 1, window[-1] + 1)
        else:
            kept = window[:0]
        wanted = count - len(kept)
        if not len(numbers):
            drawn = candidates[np.linspace(0, len(candidates) - 1, wanted).round().astype(int)]
        else:
            drawn = candidates[_distinct(len(candidates), numbers[:wanted])]
        if self.choice == "later":
            drawn = np.sort(drawn)
        return tuple(int(frame) for frame in (*kept, *drawn))


def _distinct(size: int, numbers: Sequence[float]) -> list[int]:
    """As many different indices below `size` as there are numbers: the head of a shuffle."""
    order = list(range(size))
    for place, number in enumerate(numbers):
        other = place + int(number * (size - place))
        order[place], order[other] = order[other], order[place]
    return order[: len(numbers)]
