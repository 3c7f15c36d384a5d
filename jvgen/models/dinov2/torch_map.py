"""Names and layouts of DINOv2's parameters in transformers."""

from collections.abc import Mapping
from typing import Any

from jvgen.models.dinov2.config import Dinov2Config
from jvgen.models.weight_map import LAYER, LINEAR, Entry, Transform, WeightMap, fused

BLOCK = f"encoder.layer.{LAYER}."
# Arrays that have leading axes of one there.
_ROW = Transform("row", lambda array: array[None], lambda array: array[0])
_ONE_ROW = Transform("one row", lambda array: array[None], lambda array: array.reshape(array.shape[-2:]))


def _patches(patch: int) -> Transform:
    """(p q c, out) <-> (out, c, p, q), with square patches."""
    return Transform(
        f"patches{patch}",
        lambda array: array.reshape(patch, patch, 3, -1).transpose(3, 2, 0, 1),
        lambda array: array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0]),
    )


def weight_map(config: Dinov2Config) -> WeightMap:
    """Names in the files of `Dinov2Model`; the mask token, of its training, is skipped."""
    layers, entries = "blocks/layers/", []
    for ours, theirs in (
        (f"{layers}attention_norm", f"{BLOCK}norm1"),
        (f"{layers}feed_forward_norm", f"{BLOCK}norm2"),
        ("final_norm", "layernorm"),
    ):
        entries += [Entry(f"{ours}/scale", f"{theirs}.weight"), Entry(f"{ours}/bias", f"{theirs}.bias")]
    # By the names in files, and those of modules in transformers 5.
    linear = {
        "query": ("attention.attention.query", "attention.q_proj"),
        "key": ("attention.attention.key", "attention.k_proj"),
        "value": ("attention.attention.value", "attention.v_proj"),
        "output": ("attention.output.dense", "attention.o_proj"),
    }
    if config.gated:
        linear["feed_forward/output"] = ("mlp.weights_out",)
        gate, hidden = f"{layers}feed_forward/gate", f"{layers}feed_forward/hidden"
        into = f"{BLOCK}mlp.weights_in"
        entries += fused(f"{into}.weight", {"gate": f"{gate}/kernel", "hidden": f"{hidden}/kernel"}, LINEAR)
        entries += fused(f"{into}.bias", {"gate": f"{gate}/bias", "hidden": f"{hidden}/bias"})
    else:
        linear |= {"feed_forward/hidden": ("mlp.fc1",), "feed_forward/output": ("mlp.fc2",)}
    for ours, (theirs, *others) in linear.items():
        names = [tuple(f"{BLOCK}{other}.{kind}" for other in others) for kind in ("weight", "bias")]
        entries.append(Entry(f"{layers}{ours}/kernel", f"{BLOCK}{theirs}.weight", LINEAR, aliases=names[0]))
        entries.append(Entry(f"{layers}{ours}/bias", f"{BLOCK}{theirs}.bias", aliases=names[1]))
    entries += [
        Entry(f"{layers}attention_scale", f"{BLOCK}layer_scale1.lambda1"),
        Entry(f"{layers}feed_forward_scale", f"{BLOCK}layer_scale2.lambda1"),
        Entry("class_token", "embeddings.cls_token", _ONE_ROW),
        Entry("positions", "embeddings.position_embeddings", _ROW),
        Entry("patches/kernel", "embeddings.patch_embeddings.projection.weight", _patches(config.patch)),
        Entry("patches/bias", "embeddings.patch_embeddings.projection.bias"),
    ]
    return WeightMap(tuple(entries), ignored=(r"embeddings\.mask_token",))


def to_diffusers_config(config: Dinov2Config) -> dict[str, Any]:
    """The `config.json` of `transformers.Dinov2Model`.

    Raises:
      ValueError: a feed-forward width that the class does not have.
    """
    ratio = -(-config.hidden // config.width)
    if config.gated:
        # The class keeps two thirds of ratio x width, rounded up to a multiple of 8.
        ratio = -(-3 * (config.hidden - 7) // (2 * config.width))
    if _hidden(config.width, ratio, config.gated) != config.hidden:
        raise ValueError(
            f"hidden = {config.hidden}: Dinov2Model has a multiple of width = {config.width} there (gated: two thirds "
            f"of one, such as {_hidden(config.width, ratio, config.gated)})."
        )
    return {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "mlp_ratio": ratio,
        "use_swiglu_ffn": config.gated,
        "patch_size": config.patch,
        "image_size": config.side,
        "num_channels": 3,
        "layer_norm_eps": config.norm_epsilon,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "use_mask_token": False,
    }


def from_diffusers_config(values: Mapping[str, Any]) -> Dinov2Config:
    """The configuration that a `config.json` of `Dinov2Model` describes.

    Raises:
      ValueError: another activation, no biases, or images that are not of three channels.
    """
    for name, known in (("hidden_act", "gelu"), ("qkv_bias", True), ("num_channels", 3)):
        if values.get(name, known) != known:
            raise ValueError(f"config.json: {name} = {values[name]!r}; only {known!r} is supported.")
    width, gated = values.get("hidden_size", 768), bool(values.get("use_swiglu_ffn", False))
    return Dinov2Config(
        width=width,
        layers=values.get("num_hidden_layers", 12),
        heads=values.get("num_attention_heads", 12),
        hidden=_hidden(width, values.get("mlp_ratio", 4), gated),
        gated=gated,
        patch=values.get("patch_size", 14),
        side=values.get("image_size", 224),
        norm_epsilon=float(values.get("layer_norm_eps", 1e-6)),
    )


def _hidden(width: Any, ratio: Any, gated: bool) -> Any:
    """Width of the feed-forward blocks. Values of a file may be of another type, which the config refuses."""
    hidden = width * ratio
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden
