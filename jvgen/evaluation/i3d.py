"""The Inflated 3D ConvNet (I3D), the feature network of Fréchet video distances (Carreira and Zisserman 2017).

Pure functions of a nested dict of parameters, which are read from a local file.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from jvgen.precision import product_precision
from jvgen.storage import Path, local_copy
from jvgen.storage.tensor_file import check_weights, read_tensors

NORM_EPSILON = 1e-3
CLASSES = 400
SIZE = 224  # height and width of the input in pixels
MIN_FRAMES = 9  # fewer leave nothing for the last pooling

# (name, kernel size, stride, output channels) of the convolutions before the first pooling of each stage, and channels
# of the four branches of the Inception blocks: b0, b1a, b1b, b2a, b2b, b3b.
BLOCKS = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
BRANCHES = (("b0", 1), ("b1a", 1), ("b1b", 3), ("b2a", 1), ("b2b", 3), ("b3b", 1))

Parameters = Mapping[str, Mapping[str, Any]]


def shapes() -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of the arrays of each layer, by its name as "Mixed_3b.b1a"; kernels are `T H W I O`."""
    layers = {"Conv3d_1a_7x7": (7, 3, 64), "Conv3d_2b_1x1": (1, 64, 64), "Conv3d_2c_3x3": (3, 64, 192)}
    width = 192
    for block, (zero, one, two, three, four, five) in BLOCKS.items():
        inputs = {"b0": width, "b1a": width, "b1b": one, "b2a": width, "b2b": three, "b3b": width}
        outputs = {"b0": zero, "b1a": one, "b1b": two, "b2a": three, "b2b": four, "b3b": five}
        layers |= {f"{block}.{name}": (size, inputs[name], outputs[name]) for name, size in BRANCHES}
        width = zero + two + four + five
    found: dict[str, dict[str, tuple[int, ...]]] = {
        name: {"kernel": (size,) * 3 + (into, out), **{part: (out,) for part in ("scale", "bias", "mean", "variance")}}
        for name, (size, into, out) in layers.items()
    }
    found["logits"] = {"kernel": (1, 1, 1, width, CLASSES), "bias": (CLASSES,)}
    return found


def logits(parameters: Parameters, video: Float[Array, "B F H W 3"]) -> Float[Array, "B 400"]:
    """Class scores averaged over time, before the softmax: the features of the Fréchet video distance.

    Args:
      parameters: from `load_i3d`.
      video: clips in [-1, 1], of 224x224 for values comparable with published ones (see `prepare`).

    Raises:
      ValueError: clips of fewer than 9 frames.
    """
    if video.shape[1] < MIN_FRAMES:
        raise ValueError(f"clips of {video.shape[1]} frames: I3D needs at least {MIN_FRAMES}.")
    x = _unit(parameters["Conv3d_1a_7x7"], video, stride=2)
    x = _pool(x, (1, 3, 3), (1, 2, 2))
    x = _unit(parameters["Conv3d_2b_1x1"], x)
    x = _unit(parameters["Conv3d_2c_3x3"], x)
    for stage, window, strides in (
        ("3", (1, 3, 3), (1, 2, 2)),
        ("4", (3, 3, 3), (2, 2, 2)),
        ("5", (2, 2, 2), (2, 2, 2)),
    ):
        x = _pool(x, window, strides)
        for block in (name for name in BLOCKS if name.startswith(f"Mixed_{stage}")):
            x = _inception(parameters, block, x)
    # 2x7x7 windows at stride 1; inputs of 224x224 are 7x7 here.
    window = (2, min(7, x.shape[2]), min(7, x.shape[3]))
    summed = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, *window, 1), (1,) * 5, "VALID")
    x = summed / float(np.prod(window))
    last = parameters["logits"]
    scores = jnp.matmul(x, last["kernel"][0, 0, 0], precision=product_precision(x.dtype))
    return jnp.mean(scores + last["bias"], axis=(1, 2, 3))


def prepare(video: Float[Array, "B F H W 3"]) -> Float[Array, "B F h w 3"]:
    """Clips in [0, 1] to the input of published evaluations: [-1, 1], 224x224 (bilinear, without antialiasing)."""
    batch = video.shape[0]
    frames = rearrange(video, "b f h w c -> (b f) h w c")
    resized = jax.image.resize(frames, (frames.shape[0], SIZE, SIZE, 3), "linear", antialias=False)
    return rearrange(2.0 * resized - 1.0, "(b f) h w c -> b f h w c", b=batch)


def features(weights: str | Path) -> Callable[[jax.Array], jax.Array]:
    """The feature function of published evaluations: clips in [0, 1] to the logits of an I3D with local weights.

    Raises:
      ValueError: see `load_i3d`.
    """
    return functools.partial(_features, load_i3d(weights))


def _features(parameters: Parameters, video: jax.Array) -> jax.Array:
    # float32 on every device: a distance may not depend on the accelerator.
    with jax.default_matmul_precision("highest"):
        return logits(parameters, prepare(video))


def load_i3d(path: str | Path) -> dict[str, dict[str, np.ndarray]]:
    """Parameters from a safetensors file with the names of either PyTorch port of I3D (piergiaj's or hassony2's).

    Raises:
      ValueError: a missing file, a file of another kind, or missing tensors or wrong shapes, which are listed.
    """
    path = local_copy(path)
    if not path.is_file():
        raise ValueError(f"I3D weights {str(path)!r} do not exist; give a safetensors file of a PyTorch I3D.")
    found = {_canonical(name): array for name, array in read_tensors(path).items()}
    parameters: dict[str, dict[str, np.ndarray]] = {}
    problems = []
    for layer, parts in shapes().items():
        for part, shape in parts.items():
            array = found.get(f"{layer}.{part}")
            if array is not None and part == "kernel":
                array = array.transpose(2, 3, 4, 1, 0)
            if array is None:
                problems.append(f"missing {layer}.{part} {shape}")
            elif array.shape != shape:
                problems.append(f"{layer}.{part} has shape {array.shape}, expected {shape}")
            else:
                check_weights([(f"{layer}.{part}", array)], f"I3D weights {str(path)!r}")
                parameters.setdefault(layer, {})[part] = np.ascontiguousarray(array, np.float32)
    if problems:
        raise ValueError(f"I3D weights {str(path)!r}: " + "; ".join(problems[:12]))
    return parameters


def _unit(layer: Mapping[str, Any], x: jax.Array, stride: int = 1) -> jax.Array:
    """Convolution without bias, batch norm with its running statistics, ReLU."""
    factor = layer["scale"] * jax.lax.rsqrt(jnp.asarray(layer["variance"]) + NORM_EPSILON)
    x = jax.lax.conv_general_dilated(
        x,
        jnp.asarray(layer["kernel"]) * factor,
        (stride,) * 3,
        "SAME",
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        precision=product_precision(x.dtype),
    )
    return jax.nn.relu(x + (layer["bias"] - layer["mean"] * factor))


def _inception(parameters: Parameters, block: str, x: jax.Array) -> jax.Array:
    def unit(name: str, x: jax.Array) -> jax.Array:
        return _unit(parameters[f"{block}.{name}"], x)

    pooled = _pool(x, (3, 3, 3), (1, 1, 1))
    branches = (unit("b0", x), unit("b1b", unit("b1a", x)), unit("b2b", unit("b2a", x)), unit("b3b", pooled))
    return jnp.concatenate(branches, axis=-1)


def _pool(x: jax.Array, window: tuple[int, int, int], strides: tuple[int, int, int]) -> jax.Array:
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, *window, 1), (1, *strides, 1), "SAME")


_PARTS = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "variance"}
_OTHER_BRANCHES = {
    "branch_0": "b0", "branch_1.0": "b1a", "branch_1.1": "b1b", "branch_2.0": "b2a", "branch_2.1": "b2b",
    "branch_3.1": "b3b",
}  # fmt: skip


def _canonical(name: str) -> str:
    """A name as "Mixed_3b.b1a.kernel" from either port's name of a tensor; other names unchanged."""
    match = re.fullmatch(r"(.*)\.(conv3d|bn|batch3d)\.(\w+)", name)
    if match is None:
        return name
    layer, kind, part = match.groups()
    if layer == "conv3d_0c_1x1":
        layer = "logits"
    layer = re.sub(r"^conv3d_", "Conv3d_", re.sub(r"^mixed_", "Mixed_", layer))
    for theirs, ours in _OTHER_BRANCHES.items():
        layer = layer.replace(f".{theirs}", f".{ours}") if layer.endswith(f".{theirs}") else layer
    if kind == "conv3d":
        return f"{layer}.{'kernel' if part == 'weight' else part}"
    return f"{layer}.{_PARTS.get(part, part)}"
