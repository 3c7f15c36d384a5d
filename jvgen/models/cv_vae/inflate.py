"""Inflation: parameters of a CV-VAE from those of an image autoencoder (CV-VAE, section 3.3)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jvgen.models.cv_vae.config import SHARED, CVVAEConfig
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.nested import flatten, unflatten

Parameters = Mapping[str, Any]


def inflate(image_config: ImageVAEConfig, image: Parameters, config: CVVAEConfig, start: Parameters) -> dict[str, Any]:
    """Parameters of a `CVVAE` from those of an `ImageVAE`, as numpy arrays.

    An image's kernel becomes the slice of a clip's kernel at the output's own frame: the last of a causal window, the
    middle of a symmetric one; the other slices are zero. Where a convolution gives two frames for one, both are the
    image's; with `blend_frames`, the earlier one is the mean of the image's here and in the frame before, so that
    features change evenly from one latent to the next.

    With the paddings and norms of `CVVAEConfig.causal()` the result equals the image autoencoder on clips too: latent
    frame j is the image latent of frame 4j, and decoded frame k is the image decoded from latent frame ceil(k / 4)
    (with `blend_frames`: for k = 4j, and for all k of a clip without motion). With others it is only a start.

    Args:
      image_config, image: the image autoencoder and its parameters, numpy or JAX arrays.
      config: of the video autoencoder.
      start: parameters of the video autoencoder for what an image autoencoder lacks (attention along time).

    Raises:
      ValueError: networks of different sizes; all differences are listed.
    """
    check_sizes(image_config, config)
    found = {path: np.asarray(value) for path, value in flatten(image).items()}
    if image_config.quant_convolutions and not config.quant_convolutions:
        _fold_quantization(found)
    result = {}
    for path, value in flatten(start).items():
        if path in found:
            result[path] = _inflated(
                found.pop(path), tuple(value.shape), causal=_is_causal(path, config), blend=config.blend_frames
            )
        else:
            assert "/temporal/" in path, f"an image autoencoder has no {path}"
            result[path] = np.asarray(value)
    assert not found, f"a video autoencoder has no {', '.join(sorted(found))}"
    return unflatten(result)


def check_sizes(image: ImageVAEConfig, config: CVVAEConfig) -> None:
    """Raise `ValueError` unless a video autoencoder can be inflated from an image autoencoder."""
    lines = [
        f"  {name}: {getattr(image, name)!r} of the image, {getattr(config, name)!r} of the video autoencoder"
        for name in SHARED
        if name not in ("remat", "quant_convolutions") and getattr(image, name) != getattr(config, name)
    ]
    if config.quant_convolutions and not image.quant_convolutions:
        lines.append("  quant_convolutions: the image autoencoder has none; set it to false")
    if lines:
        raise ValueError("the image and the video autoencoder differ in size:\n" + "\n".join(lines))


def _is_causal(path: str, config: CVVAEConfig) -> bool:
    if path.startswith("encoder/"):
        return True
    return (config.padding.upsample_time if "/resample/" in path else config.padding.decoder_time) == "causal"


def _inflated(value: np.ndarray, shape: tuple[int, ...], *, causal: bool, blend: bool) -> np.ndarray:
    """A kernel or bias of an image autoencoder in the shape of a video autoencoder's."""
    width = value.shape[-1]
    doubles = width != shape[-1]
    if doubles:
        # Two frames for one: the outer part of the channel index is the frame.
        value = np.concatenate([value] * (shape[-1] // width), axis=-1)
    if value.ndim == len(shape):
        return value.reshape(shape)
    kernel = np.zeros(shape, value.dtype)
    now = shape[0] - 1 if causal else shape[0] // 2
    kernel[now] = value
    if doubles and blend:
        kernel[now, ..., :width] = kernel[now - 1, ..., :width] = value[..., :width] / 2
    return kernel


def _fold_quantization(parameters: dict[str, np.ndarray]) -> None:
    """Fold the quantization convolutions into their neighbors, in place.

    Exact in the encoder, and in the decoder except at its outermost pixels, which the folded bias does not reach: a
    convolution pads its input with zeros after the quantization convolution, but before the folded one.
    """
    kernel, bias = parameters.pop("quant/kernel"), parameters.pop("quant/bias")
    parameters["encoder/conv_out/kernel"] = parameters["encoder/conv_out/kernel"] @ kernel
    parameters["encoder/conv_out/bias"] = parameters["encoder/conv_out/bias"] @ kernel + bias
    kernel, bias = parameters.pop("post_quant/kernel"), parameters.pop("post_quant/bias")
    conv_in = parameters["decoder/conv_in/kernel"]
    parameters["decoder/conv_in/bias"] = parameters["decoder/conv_in/bias"] + np.einsum("i,hwio->o", bias, conv_in)
    parameters["decoder/conv_in/kernel"] = np.einsum("zi,hwio->hwzo", kernel, conv_in)
