"""The Fréchet video distance (FVD): the Fréchet distance between features of two sets of clips."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jvgen.finite import NotFinite

FEATURE_BATCH = 16  # clips per call of the feature network
RANGE_TOLERANCE = 0.01  # clips of a network may be this far outside of [0, 1]


@dataclasses.dataclass(frozen=True)
class Moments:
    """Count, sum and sum of outer products of features, float64; additive over batches and processes."""

    count: int
    total: np.ndarray
    products: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> "Moments":
        """Of features (N, D)."""
        features = np.asarray(features, np.float64)
        if features.ndim != 2:
            raise ValueError(f"features {features.shape}: expected (samples, width).")
        return cls(len(features), features.sum(axis=0), features.T @ features)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.count + other.count, self.total + other.total, self.products + other.products)

    @property
    def mean(self) -> np.ndarray:
        """(D,)."""
        return self.total / self.count

    @property
    def covariance(self) -> np.ndarray:
        """(D, D), divided by the count, as in published implementations."""
        return self.products / self.count - np.outer(self.mean, self.mean)


class VideoDistance:
    """The Fréchet distance between recorded and generated clips, accumulated over batches.

    As published (Unterthiner et al. 2018; iVideoGPT): features of whole clips, covariances divided by the count.
    Biased: compare only values from equal numbers of clips.

    Args:
      features: clips in [0, 1], `N F H W 3`, to `N D`; see `jvgen.evaluation.i3d.features`.
      name: of the metric in `result`.
    """

    def __init__(self, features: Callable[[jax.Array], jax.Array], name: str = "fvd"):
        self._features, self._name = jax.jit(features), name
        self._moments: list[Moments | None] = [None, None]

    def add(self, recorded: Float[np.ndarray, "N F H W 3"], generated: Float[np.ndarray, "M F H W 3"]) -> None:
        """Add a batch of clips to both sides.

        Raises:
          ValueError: clips that are not in [0, 1], as those of 8 bits are not.
          NotFinite: their features hold NaN or infinity.
        """
        for side, clips in enumerate((recorded, generated)):
            self._check_range(clips, ("recorded", "generated")[side])
            for start in range(0, len(clips), FEATURE_BATCH):
                features = np.asarray(self._features(clips[start : start + FEATURE_BATCH]))
                if not np.isfinite(features).all():
                    raise NotFinite(
                        f"{self._name}: features of {('recorded', 'generated')[side]} clips hold NaN or infinity: the "
                        "clips do, or the weights of the feature network are damaged."
                    )
                found = Moments.of(features)
                before = self._moments[side]
                self._moments[side] = found if before is None else before + found

    def _check_range(self, clips: np.ndarray, side: str) -> None:
        if not len(clips):
            return
        low, high = float(np.min(clips)), float(np.max(clips))
        if not jnp.issubdtype(clips.dtype, jnp.floating) or low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
            raise ValueError(
                f"{self._name}: {side} clips are {clips.dtype} from {low:g} to {high:g}; give floats in [0, 1] (divide "
                "8-bit pixels by 255)."
            )

    def result(self) -> dict[str, float]:
        """The distance by its name, and the number of clips on both sides."""
        recorded, generated = self._moments
        assert recorded is not None and generated is not None, "no batch was added"
        return {
            self._name: frechet_distance(recorded, generated),
            f"{self._name}_recorded_clips": float(recorded.count),
            f"{self._name}_made_clips": float(generated.count),
        }


def frechet_distance(first: Moments | Float[np.ndarray, "N D"], second: Moments | Float[np.ndarray, "M D"]) -> float:
    """`|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))` of two Gaussians (Heusel et al. 2017, Unterthiner et al. 2018).

    Biased: it falls with the number of samples. Compare only values from equal counts; with fewer samples than feature
    dimensions it is not meaningful.

    Args:
      first, second: features, a row per sample; or their sums over batches (`Moments.of`, added up).

    Raises:
      ValueError: fewer than 2 samples on either side.
    """
    first, second = (side if isinstance(side, Moments) else Moments.of(side) for side in (first, second))
    if min(first.count, second.count) < 2:
        raise ValueError(f"{first.count} and {second.count} samples: the covariance needs at least 2 on both sides.")
    root = _root(first.covariance)
    # tr (C1 C2)^(1/2) over the symmetric matrix C1^(1/2) C2 C1^(1/2), which has the same eigenvalues.
    values = np.linalg.eigvalsh(root @ second.covariance @ root)
    overlap = np.sqrt(np.maximum(values, 0.0)).sum()
    difference = first.mean - second.mean
    spread = np.trace(first.covariance) + np.trace(second.covariance) - 2 * overlap
    # Rounding of rank-deficient covariances makes the distance of equal sets slightly negative.
    return max(float(difference @ difference + spread), 0.0)


def _root(matrix: np.ndarray) -> np.ndarray:
    """The symmetric square root; negative eigenvalues from rounding are set to 0."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
