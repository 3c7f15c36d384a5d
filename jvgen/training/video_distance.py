"""The Fréchet video distance of a task's predictions, gathered over the batches of an evaluation."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jvgen.evaluation import i3d
from jvgen.evaluation.distribution import Moments, frechet_distance
from jvgen.nn.network import Parameters
from jvgen.parallel import axes
from jvgen.training.program import Program

PIECE = 16  # clips that go through the feature network together


class VideoDistance:
    """Features of recorded clips and of predicted ones, batch after batch.

    As published (Unterthiner et al. 2018; iVideoGPT): whole clips, their context as reconstructed, covariances divided
    by the count. Biased: compare equal numbers of clips only.

    Args:
      program: of a task with `predicted_clips(parameters, frozen, batch, key) -> (recorded, predicted)`, both
        `N F H W 3` in [0, 1].
      features: clips in [0, 1] to `N D`; see `i3d_features`.

    Raises:
      ValueError: a task that predicts no clips.
    """

    def __init__(self, program: Program, features: Callable[[jax.Array], jax.Array]):
        predict = getattr(program.task, "predicted_clips", None)
        if predict is None:
            raise ValueError("--fvd-weights: only runs that predict clips (a world model) have a video distance.")

        def placed(*given: Any) -> tuple[jax.Array, jax.Array]:
            with axes.partitioned(program.sharding):
                return predict(*given)

        self._predict = jax.jit(placed, out_shardings=program.sharding.replicated)
        self._features = jax.jit(features)
        self._moments: list[Moments | None] = [None, None]

    def add(self, parameters: Parameters, frozen: Parameters, batch: Any, key: jax.Array) -> None:
        """Take in a batch."""
        for side, clips in enumerate(self._predict(parameters, frozen, batch, key)):
            clips = np.asarray(clips)
            for start in range(0, len(clips), PIECE):
                found = Moments.of(np.asarray(self._features(clips[start : start + PIECE])))
                before = self._moments[side]
                self._moments[side] = found if before is None else before + found

    def result(self) -> dict[str, float]:
        """`fvd`, and how many clips of either side it is from."""
        recorded, predicted = self._moments
        assert recorded is not None and predicted is not None, "no batch was added"
        return {
            "fvd": frechet_distance(recorded, predicted),
            "fvd_recorded_clips": float(recorded.count),
            "fvd_predicted_clips": float(predicted.count),
        }


def i3d_features(weights: Path) -> Callable[[jax.Array], jax.Array]:
    """Scores of an I3D with local weights, as the published measurements take them.

    Raises:
      ValueError: see `jvgen.evaluation.i3d.load_i3d`.
    """
    return functools.partial(_scores, i3d.load_i3d(weights))


def _scores(parameters: Parameters, clips: jax.Array) -> jax.Array:
    return i3d.logits(parameters, i3d.prepare(clips))
