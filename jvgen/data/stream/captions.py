"""Which caption of a record an example has, and how much of it."""

import dataclasses
import difflib
import re
from collections.abc import Sequence

import numpy as np

from jvgen.config import Config
from jvgen.data.store.index import Index
from jvgen.value_rules import BelowOne, Weight

UNNAMED = "unnamed"
# Uniform numbers that a caption is drawn with; sentences after the last one are kept or left out like it.
UNIFORMS = 18
_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionConfig(Config):
    """How captions are drawn when records have several, and shortened.

    Whole captions are left out for classifier-free guidance by `task.caption_dropout`.

    Attributes:
      weights: share of the examples by the name of a caption ("short", "long", a captioner; "unnamed" for those
        without a name), relative to the other names that a record has, and shared by captions of one name. A missing
        name counts 1; 0 leaves captions out, and a record whose captions are all left out has none.
      first_sentence: fraction of the captions of which only the first sentence is used.
      sentence_dropout: fraction of the sentences after the first that are left out of the others.
    """

    weights: dict[str, Weight] = dataclasses.field(default_factory=dict)
    first_sentence: BelowOne = 0.0
    sentence_dropout: BelowOne = 0.0


@dataclasses.dataclass(frozen=True)
class CaptionDraw:
    """A caption that is still to be drawn: which one depends on what the record has.

    Attributes:
      config: weights and dropout.
      uniforms: `UNIFORMS` numbers in [0, 1); none for the first caption with a weight, whole (evaluation).
    """

    config: CaptionConfig
    uniforms: tuple[float, ...] = ()

    def draw(self, captions: Sequence[str], names: Sequence[str]) -> str:
        """The caption of an example; "" without one.

        Args:
          captions: of the record.
          names: one per caption, or none.
        """
        chosen = self.choose(len(captions), names)
        if chosen < 0 or not self.uniforms:
            return "" if chosen < 0 else captions[chosen]
        return self._shortened(captions[chosen])

    def choose(self, count: int, names: Sequence[str]) -> int:
        """The number of the caption of an example among `count`; -1 without one."""
        names = [name or UNNAMED for name in names or [UNNAMED] * count]
        weights = np.array([self.config.weights.get(name, 1.0) / names.count(name) for name in names])
        if not weights.sum():
            return -1
        if not self.uniforms:
            return int(np.argmax(weights > 0))
        borders = np.cumsum(weights) / weights.sum()
        chosen = int(np.searchsorted(borders, self.uniforms[0], side="right"))
        return min(chosen, int(np.flatnonzero(weights)[-1]))

    def _shortened(self, caption: str) -> str:
        if not (self.config.first_sentence or self.config.sentence_dropout):
            return caption
        first, *others = _SENTENCE_END.split(caption)
        if self.uniforms[1] < self.config.first_sentence:
            return first
        draws = self.uniforms[2:]
        kept = [
            sentence
            for number, sentence in enumerate(others)
            if draws[min(number, len(draws) - 1)] >= self.config.sentence_dropout
        ]
        return " ".join([first, *kept])


def check_caption_names(config: CaptionConfig | None, indices: Sequence[Index]) -> None:
    """Raise `ValueError` for a weight of a name that no caption of the sources has."""
    known = {UNNAMED, *(name for index in indices for name in index.caption_names)}
    for name in config.weights if config is not None else ():
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"data.captions.weights.{name}: no caption of the sources has this name; names are "
                f"{', '.join(sorted(known))}.{hint}"
            )
