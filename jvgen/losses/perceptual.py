"""Perceptual distance of images: LPIPS on VGG-16, or a Laplacian-pyramid distance that needs no weights."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from jvgen.config import Config
from jvgen.parallel.axes import BATCH, constrain
from jvgen.precision import product_precision
from jvgen.storage import Path, local_copy
from jvgen.storage.tensor_file import check_weights, read_tensors
from jvgen.value_rules import Bounds

# VGG-16's convolutions by stage: (index in torchvision's `features`, input channels, output channels).
STAGES = (
    ((0, 3, 64), (2, 64, 64)),
    ((5, 64, 128), (7, 128, 128)),
    ((10, 128, 256), (12, 256, 256), (14, 256, 256)),
    ((17, 256, 512), (19, 512, 512), (21, 512, 512)),
    ((24, 512, 512), (26, 512, 512), (28, 512, 512)),
)
# ImageNet's statistics, for images in [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerceptualConfig(Config):
    """Selects the perceptual distance.

    Attributes:
      kind: "none", "lpips" (Zhang et al. 2018 on VGG-16, needs `weights`), or "laplacian" (L1 of a Laplacian pyramid:
        needs no weights, not comparable with LPIPS).
      weights: safetensors file for lpips: VGG-16's convolutions and the five linear layers, under the names of
        torchvision and of the lpips or taming-transformers packages. `jvgen lpips` writes it.
      levels: of the pyramid.
    """

    kind: Literal["none", "lpips", "laplacian"] = "laplacian"
    weights: str | None = None
    levels: Annotated[int, Bounds(at_least=1, at_most=16)] = 3

    def validate(self) -> None:
        if self.kind == "lpips" and self.weights is None:
            raise ValueError("weights = none: lpips needs a safetensors file; kind = 'laplacian' needs none.")
        if self.kind != "lpips" and self.weights is not None:
            raise ValueError(f"weights = {self.weights!r}: {self.kind!r} reads no weights; choose kind = 'lpips'.")


def laplacian_distance(
    prediction: Float[Array, "B H W C"], target: Float[Array, "B H W C"], levels: int = 3
) -> Float[Array, "B"]:
    """L1 distance of the Laplacian pyramids of two images, level k weighted by 2^k (Bojanowski et al. 2018, section 4).

    Emphasizes edges and texture at several scales. Sides are halved `levels` times by averaging; odd sides are cropped.
    The coarsest level compares local means.
    """
    difference = prediction.astype(jnp.float32) - target.astype(jnp.float32)
    distance = jnp.zeros(difference.shape[:1], jnp.float32)
    for level in range(levels):
        batch, height, width, channels = difference.shape
        if min(height, width) < 2:
            break
        height, width = height // 2 * 2, width // 2 * 2
        blocks = difference[:, :height, :width].reshape(batch, height // 2, 2, width // 2, 2, channels)
        coarse = jnp.mean(blocks, axis=(2, 4), keepdims=True)
        # The pyramid is linear, so the pyramid of the difference is the difference of the pyramids.
        distance += 2.0**level * jnp.mean(jnp.abs(blocks - coarse), axis=(1, 2, 3, 4, 5))
        difference = coarse[:, :, 0, :, 0]
    return distance + 2.0**levels * jnp.mean(jnp.abs(difference), axis=(1, 2, 3))


class LPIPS(nnx.Module):
    """Learned perceptual distance on VGG-16 features (Zhang et al. 2018), version 0.1.

    Parameters are random until replaced by those of `load_lpips`; distances with random parameters are meaningless.
    Convolutions run in the dtype of the images, distances in float32. Input sides are at least 16 pixels.
    """

    def __init__(self, *, rngs: nnx.Rngs):
        initializer = nnx.initializers.he_normal()
        convolutions = {}
        for index, features_in, features_out in _convolutions():
            kernel = initializer(rngs.params(), (3, 3, features_in, features_out), jnp.float32)
            convolutions[str(index)] = nnx.Dict(
                kernel=nnx.Param(kernel, logical_axes=(None,) * 4),
                bias=nnx.Param(jnp.zeros((features_out,), jnp.float32), logical_axes=(None,)),
            )
        self.convolutions = nnx.Dict(convolutions)
        self.weights = nnx.Dict(
            {
                str(stage): nnx.Param(jnp.full((layers[-1][2],), 1.0 / layers[-1][2]), logical_axes=(None,))
                for stage, layers in enumerate(STAGES)
            }
        )

    def __call__(self, prediction: Float[Array, "B H W 3"], target: Float[Array, "B H W 3"]) -> Float[Array, "B"]:
        """Distance of images in [-1, 1], one per sample, float32."""
        if min(prediction.shape[1:3]) < 16:
            raise ValueError(f"LPIPS needs sides of at least 16 pixels, got images of {prediction.shape[1:3]}.")
        distance = jnp.zeros(prediction.shape[:1], jnp.float32)
        # One pass over both images, interleaved so that each pair stays on its device: concatenated along the batch,
        # XLA would gather all features on all devices.
        features = constrain(rearrange([prediction, target], "p b h w c -> (b p) h w c"), BATCH, None, None, None)
        features = (features - jnp.asarray(SHIFT, features.dtype)) / jnp.asarray(SCALE, features.dtype)
        for stage, layers in enumerate(STAGES):
            if stage:
                features = _max_pool(features)
            for index, _, _ in layers:
                layer = self.convolutions[str(index)]
                kernel = constrain(layer["kernel"][...], None, None, None, None)
                features = _convolve(features, kernel, layer["bias"][...])
            features = constrain(features, BATCH, None, None, None)
            first, second = rearrange(_unit(features.astype(jnp.float32)), "(b p) h w c -> p b h w c", p=2)
            weights = self.weights[str(stage)][...]
            distance += jnp.mean(jnp.sum(jnp.square(first - second) * weights, axis=-1), axis=(1, 2))
        return distance


def _convolve(features: Array, kernel: Array, bias: Array) -> Array:
    output = jax.lax.conv_general_dilated(
        features,
        kernel.astype(features.dtype),
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=product_precision(features.dtype),
    )
    return jax.nn.relu(output + bias.astype(features.dtype))


def _convolutions() -> tuple[tuple[int, int, int], ...]:
    return tuple(layer for layers in STAGES for layer in layers)


def _max_pool(features: Array) -> Array:
    return jax.lax.reduce_window(features, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def _unit(features: Array) -> Array:
    # Both epsilons are in the published code: one keeps the square root differentiable, the other the division finite.
    norm = jnp.sqrt(jnp.sum(jnp.square(features), axis=-1, keepdims=True) + 1e-10)
    return features / (norm + 1e-10)


def load_lpips(path: str | Path) -> dict[str, Any]:
    """Parameters of `LPIPS` from a safetensors file, as a nested dict of float32 host arrays.

    Convolutions are found as `features.N.weight` or `slice*.N.weight` with any prefix (torchvision, lpips,
    taming-transformers), the linear layers as `lin0.model.1.weight` ... `lin4.model.1.weight`.

    Raises:
      ValueError: no such file, a file of another kind, or missing tensors or wrong shapes; all are listed.
    """
    path = local_copy(path)
    if not path.is_file():
        raise ValueError(
            f"LPIPS weights {str(path)!r}: no such file; `jvgen lpips` writes it (safetensors with VGG-16 and "
            "lin0..lin4)."
        )
    tensors = {canonical_name(name): array for name, array in read_tensors(path).items()}
    tensors = checked_tensors(tensors, f"LPIPS weights {str(path)!r}")
    return {
        "convolutions": {
            str(index): {
                "kernel": np.ascontiguousarray(tensors[f"{index}.weight"].transpose(2, 3, 1, 0)),
                "bias": tensors[f"{index}.bias"],
            }
            for index, _, _ in _convolutions()
        },
        "weights": {str(stage): tensors[f"lin{stage}"].reshape(-1) for stage in range(len(STAGES))},
    }


def checked_tensors(found: Mapping[str, np.ndarray], source: str) -> dict[str, np.ndarray]:
    """The tensors of LPIPS, float32, by canonical name in the network's order.

    Raises:
      ValueError: missing tensors or wrong shapes, all are listed after `source`; or values that are no weights.
    """
    wanted: dict[str, tuple[int, ...]] = {}
    for index, features_in, features_out in _convolutions():
        wanted[f"{index}.weight"] = (features_out, features_in, 3, 3)
        wanted[f"{index}.bias"] = (features_out,)
    for stage, layers in enumerate(STAGES):
        wanted[f"lin{stage}"] = (1, layers[-1][2], 1, 1)
    problems = [f"missing {name} {shape}" for name, shape in wanted.items() if name not in found]
    problems += [
        f"{name} has shape {found[name].shape}, expected {shape}"
        for name, shape in wanted.items()
        if name in found and found[name].shape != shape
    ]
    if problems:
        raise ValueError(f"{source}: " + "; ".join(problems))
    check_weights(((name, found[name]) for name in wanted), source)
    return {name: np.asarray(found[name], np.float32) for name in wanted}


def canonical_name(name: str) -> str:
    """A published tensor's name without the prefixes of packages: "N.weight", "N.bias", "linK"."""
    convolution = re.search(r"(?:features|slice\d)\.(\d+\.(?:weight|bias))$", name)
    if convolution:
        return convolution.group(1)
    linear = re.search(r"(lin\d)\.model\.1\.weight$", name)
    return linear.group(1) if linear else name
