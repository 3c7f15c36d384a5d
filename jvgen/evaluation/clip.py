"""CLIP (Radford et al. 2021): embeddings of captions and frames, for the agreement of clips with their captions.

Pure functions of a nested dict of parameters, which are read from a local folder that transformers' `CLIPModel` and
its tokenizer were saved to.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int
from safetensors import safe_open

from jvgen.storage import Path, as_path, local_copy, read_json_object, reading
from jvgen.storage.tensor_file import check_weights

# Of the pixels of CLIP's training images, in [0, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
BATCH = 32  # frames per call of the image tower
_LEGACY_END = 2  # an eos_token_id that configs of the first release have, which is not the tokenizer's
_TOKENIZER = "tokenizer.json"
# Parts of a block, by ours and transformers' names.
_BLOCK = {
    "norm1": "layer_norm1", "query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj",
    "output": "self_attn.out_proj", "norm2": "layer_norm2", "hidden": "mlp.fc1", "down": "mlp.fc2",
}  # fmt: skip

Parameters = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Tower:
    """One of the two transformers: of tokens, or of patches.

    Attributes:
      width, hidden, layers, heads: channels, width of the feed-forward blocks, blocks, heads.
      activation: "quick_gelu" (x sigmoid(1.702 x)) or "gelu".
      norm_epsilon: added to variances.
      positions: tokens of a text, or patches and the class token of an image.
    """

    width: int
    hidden: int
    layers: int
    heads: int
    activation: str
    norm_epsilon: float
    positions: int


@dataclasses.dataclass(frozen=True)
class ClipArchitecture:
    """Both towers.

    Attributes:
      text, image: the towers.
      features: width of the common space.
      vocabulary: tokens.
      end: id of the token whose embedding is the text's; None for the largest id of a text.
      side, patch: height and width of an image, and of a patch, in pixels.
    """

    text: Tower
    image: Tower
    features: int
    vocabulary: int
    end: int | None
    side: int
    patch: int


class Clip:
    """The two towers and the tokenizer of a folder.

    Args:
      folder: with config.json, model.safetensors and tokenizer.json.

    Raises:
      ValueError: a file is missing, cannot be read, or is not that of a CLIP model; missing tensors are listed.
    """

    def __init__(self, folder: str | Path):
        self.architecture, self._parameters = load_clip(folder)
        self._tokenizer = _tokenizer(as_path(folder) / _TOKENIZER)
        self._texts = jax.jit(functools.partial(text_features, self.architecture))
        self._images = jax.jit(lambda p, x: image_features(self.architecture, p, prepare(x, self.architecture.side)))

    def captions(self, captions: Sequence[str]) -> np.ndarray:
        """Embeddings of captions, float32 `N D` of length 1; captions that are too long are truncated."""
        length, rows = self.architecture.text.positions, []
        for caption in captions:
            ids = self._tokenizer.encode(caption).ids
            if len(ids) > length:
                ids = [*ids[: length - 1], ids[-1]]
            # Attention is causal: what follows the end changes nothing.
            rows.append(ids + [ids[-1]] * (length - len(ids)))
        return _unit(np.asarray(self._texts(self._parameters, jnp.asarray(rows, jnp.int32))))

    def frames(self, frames: np.ndarray) -> np.ndarray:
        """Embeddings of frames, uint8 `N H W 3`, float32 `N D` of length 1."""
        found = []
        for start in range(0, len(frames), BATCH):
            some = frames[start : start + BATCH]
            filled = np.concatenate([some, np.repeat(some[-1:], BATCH - len(some), axis=0)])
            found.append(np.asarray(self._images(self._parameters, jnp.asarray(filled)))[: len(some)])
        return _unit(np.concatenate(found))

    def scores(self, clips: np.ndarray, captions: Sequence[str]) -> dict[str, float]:
        """Cosines of clips, uint8 `N F H W 3`, with their captions, and of their neighboring frames; means over clips.

        "clip_text" is CLIPSIM (Wu et al. 2021) without its factor 100, the mean over frames; "clip_frames" is that of
        frames that follow each other, left out for clips of one frame.
        """
        texts, count = self.captions(captions), clips.shape[1]
        frames = rearrange(self.frames(rearrange(clips, "n f h w c -> (n f) h w c")), "(n f) d -> n f d", f=count)
        found = {"clip_text": float(np.mean(np.einsum("nfd,nd->nf", frames, texts)))}
        if count > 1:
            found["clip_frames"] = float(np.mean(np.sum(frames[:, 1:] * frames[:, :-1], axis=-1)))
        return found


def text_features(
    architecture: ClipArchitecture, parameters: Parameters, tokens: Int[Array, "B L"]
) -> Float[Array, "B D"]:
    """What `CLIPModel.get_text_features` returns: the projected embedding of the end token; not normalized."""
    tower, own = architecture.text, parameters["text"]
    x = own["tokens"][tokens] + own["positions"][: tokens.shape[1]]
    x = _norm(own["final_norm"], _blocks(tower, own["blocks"], x, causal=True), tower.norm_epsilon)
    ends = jnp.argmax(tokens if architecture.end is None else tokens == architecture.end, axis=-1)
    return _matmul(x[jnp.arange(len(tokens)), ends], parameters["text_projection"])


def image_features(
    architecture: ClipArchitecture, parameters: Parameters, images: Float[Array, "B H W 3"]
) -> Float[Array, "B D"]:
    """What `CLIPModel.get_image_features` returns of images from `prepare`; not normalized."""
    tower, own, patch = architecture.image, parameters["image"], architecture.patch
    patches = rearrange(images, "b (h p) (w q) c -> b (h w) (c p q)", p=patch, q=patch)
    x = _matmul(patches, own["patches"])
    first = jnp.broadcast_to(own["class"], (len(x), 1, tower.width))
    x = jnp.concatenate([first, x], axis=1) + own["positions"]
    x = _blocks(tower, own["blocks"], _norm(own["first_norm"], x, tower.norm_epsilon), causal=False)
    return _matmul(_norm(own["final_norm"], x[:, 0], tower.norm_epsilon), parameters["image_projection"])


def prepare(frames: Array, side: int) -> Float[Array, "B side side 3"]:
    """uint8 frames `B H W 3` as CLIP's processor prepares them: bicubic to the shorter side, center crop, norm."""
    height, width = frames.shape[1:3]
    # In this order, as published: 720 x (336 / 480) is 503 after rounding.
    size = tuple(int(side * length / min(height, width)) for length in (height, width))
    x = frames.astype(jnp.float32)
    # The published processor resizes 8-bit pictures, rows first, and rounds after either direction.
    for shape in ((len(frames), height, size[1], 3), (len(frames), *size, 3)):
        x = jnp.clip(jnp.round(jax.image.resize(x, shape, "cubic", antialias=True)), 0.0, 255.0)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    x = x[:, top : top + side, left : left + side] / 255.0
    return (x - jnp.asarray(MEAN)) / jnp.asarray(STD)


def _blocks(tower: Tower, stacked: Parameters, x: jax.Array, *, causal: bool) -> jax.Array:
    length, width = x.shape[1], tower.width // tower.heads
    hidden_from = jnp.tril(jnp.ones((length, length), bool)) if causal else jnp.ones((length, length), bool)

    def block(x: jax.Array, layer: Parameters) -> tuple[jax.Array, None]:
        normed = _norm(layer["norm1"], x, tower.norm_epsilon)
        query, key, value = (
            rearrange(_linear(layer[name], normed), "b l (n d) -> b n l d", n=tower.heads)
            for name in ("query", "key", "value")
        )
        scores = _matmul(query * width**-0.5, jnp.swapaxes(key, -1, -2))
        weights = jax.nn.softmax(jnp.where(hidden_from, scores, -jnp.inf), axis=-1)
        mixed = rearrange(_matmul(weights, value), "b n l d -> b l (n d)")
        x = x + _linear(layer["output"], mixed)
        hidden = _linear(layer["hidden"], _norm(layer["norm2"], x, tower.norm_epsilon))
        return x + _linear(layer["down"], _ACTIVATIONS[tower.activation](hidden)), None

    return jax.lax.scan(block, x, stacked)[0]


_ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


def _matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    # float32 on every device: a score may not depend on the accelerator.
    return jnp.matmul(x, kernel, precision=jax.lax.Precision.HIGHEST)


def _linear(layer: Parameters, x: jax.Array) -> jax.Array:
    return _matmul(x, layer["kernel"]) + layer["bias"]


def _norm(layer: Parameters, x: jax.Array, epsilon: float) -> jax.Array:
    centered = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
    return centered * jax.lax.rsqrt(variance + epsilon) * layer["kernel"] + layer["bias"]


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


# Files.


def load_clip(folder: str | Path) -> tuple[ClipArchitecture, dict[str, Any]]:
    """Architecture and float32 parameters of a folder with config.json and model.safetensors.

    Raises:
      ValueError: see `Clip`.
    """
    folder = as_path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(f"CLIP weights {str(folder)!r}: no {name}; save `CLIPModel` and its processor there.")
    architecture = _architecture(read_json_object(folder / "config.json"), folder)
    path = local_copy(folder / "model.safetensors")
    with reading(path, "is not a valid safetensors file"), safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    return architecture, _parameters(architecture, tensors, f"CLIP weights {str(path)!r}")


def _architecture(values: Mapping[str, Any], folder: Path) -> ClipArchitecture:
    if values.get("model_type") != "clip":
        raise ValueError(f"{folder}/config.json: model_type = {values.get('model_type')!r}; expected 'clip'.")
    text, image = values.get("text_config") or {}, values.get("vision_config") or {}

    def tower(given: Mapping[str, Any], defaults: tuple[int, int, int], positions: int) -> Tower:
        names = ("hidden_size", "intermediate_size", "num_attention_heads")
        width, hidden, heads = (int(given.get(n, default)) for n, default in zip(names, defaults, strict=True))
        activation = given.get("hidden_act", "quick_gelu")
        if activation not in _ACTIVATIONS:
            known = " and ".join(_ACTIVATIONS)
            raise ValueError(f"{folder}/config.json: hidden_act = {activation!r}; {known} are known.")
        return Tower(
            width, hidden, int(given.get("num_hidden_layers", 12)), heads, activation,
            float(given.get("layer_norm_eps", 1e-5)), positions,
        )  # fmt: skip

    side, patch = int(image.get("image_size", 224)), int(image.get("patch_size", 32))
    end = text.get("eos_token_id", _LEGACY_END)
    return ClipArchitecture(
        text=tower(text, (512, 2048, 8), int(text.get("max_position_embeddings", 77))),
        image=tower(image, (768, 3072, 12), (side // patch) ** 2 + 1),
        features=int(values.get("projection_dim", 512)),
        vocabulary=int(text.get("vocab_size", 49408)),
        end=None if end == _LEGACY_END else end,
        side=side,
        patch=patch,
    )


def _parameters(architecture: ClipArchitecture, tensors: Mapping[str, np.ndarray], source: str) -> dict[str, Any]:
    problems: list[str] = []

    def take(name: str, *shape: int) -> np.ndarray:
        tensor = tensors.get(name)
        if tensor is None:
            problems.append(f"missing {name} {shape}")
        elif tensor.shape != shape:
            problems.append(f"{name} has shape {tensor.shape}, expected {shape}")
        elif not np.issubdtype(tensor.dtype, np.floating) and tensor.dtype.name != "bfloat16":
            problems.append(f"{name} is {tensor.dtype}, expected floats")
        else:
            check_weights([(name, tensor)], source)
            return np.ascontiguousarray(tensor, np.float32)
        return np.zeros(shape, np.float32)

    def layer(name: str, *shape: int) -> dict[str, np.ndarray]:
        return {"kernel": take(f"{name}.weight", *shape).T, "bias": take(f"{name}.bias", shape[0])}

    def blocks(prefix: str, tower: Tower) -> dict[str, Any]:
        width, hidden = tower.width, tower.hidden
        shapes = {name: (width,) if name.startswith("norm") else (width, width) for name in _BLOCK}
        shapes |= {"hidden": (hidden, width), "down": (width, hidden)}
        layers = [
            {ours: layer(f"{prefix}.encoder.layers.{n}.{theirs}", *shapes[ours]) for ours, theirs in _BLOCK.items()}
            for n in range(tower.layers)
        ]
        return jax.tree.map(lambda *parts: np.stack(parts), *layers)

    text, image, patch = architecture.text, architecture.image, architecture.patch
    found = {
        "text": {
            "tokens": take("text_model.embeddings.token_embedding.weight", architecture.vocabulary, text.width),
            "positions": take("text_model.embeddings.position_embedding.weight", text.positions, text.width),
            "blocks": blocks("text_model", text),
            "final_norm": layer("text_model.final_layer_norm", text.width),
        },
        "image": {
            "class": take("vision_model.embeddings.class_embedding", image.width),
            "patches": take("vision_model.embeddings.patch_embedding.weight", image.width, 3, patch, patch)
            .reshape(image.width, -1)
            .T,
            "positions": take("vision_model.embeddings.position_embedding.weight", image.positions, image.width),
            "first_norm": layer("vision_model.pre_layrnorm", image.width),
            "blocks": blocks("vision_model", image),
            "final_norm": layer("vision_model.post_layernorm", image.width),
        },
        "text_projection": take("text_projection.weight", architecture.features, text.width).T,
        "image_projection": take("visual_projection.weight", architecture.features, image.width).T,
    }
    if problems:
        raise ValueError(f"{source}: " + "; ".join(problems[:12]))
    return found


def _tokenizer(path: Path) -> Any:
    path = local_copy(path)
    if not path.is_file():
        raise ValueError(f"CLIP weights {str(path.parent)!r}: no {path.name}; save CLIP's fast tokenizer there.")
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise ValueError(f"reading {str(path)!r} needs the package 'tokenizers': `pip install jvgen[t5]`.") from error
    with reading(path, "is not a tokenizer"):
        text = path.read_text(encoding="utf-8")
        json.loads(text)
        tokenizer = tokenizers.Tokenizer.from_str(text)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
