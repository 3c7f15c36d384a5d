"""Files of LoRA adapters of a denoiser: diffusers' `pytorch_lora_weights.safetensors` and those of SAT.

In diffusers a layer is named as its kernel is ("transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"); in SAT
("...layers.0.attention.query_key_value.matrix_A.0") queries, keys and values, which share a kernel there, have a pair
of matrices each.
"""

import dataclasses
import json
import math
from collections.abc import Collection, Mapping
from typing import Literal

import numpy as np

from jvgen import nested
from jvgen.finite import narrowed
from jvgen.interop.digest import file_digest
from jvgen.interop.file_digests import add_digest
from jvgen.interop.from_torch import open_file
from jvgen.interop.safetensors_file import SafetensorsFile, TensorSpec, write
from jvgen.interop.to_torch import FILE_DTYPES, ExportError
from jvgen.models.video_dit.config import VideoDiTConfig
from jvgen.models.video_dit.model import VideoDiT
from jvgen.models.video_dit.torch_map import weight_map
from jvgen.models.weight_map import LAYER, LINEAR, Entry, WeightError, WeightMap, pointwise
from jvgen.nn.lora import DOWN, UP, linear_layers, pairs
from jvgen.nn.network import Network, Parameters
from jvgen.storage import Path, as_path, local_file, reading

Layout = Literal["diffusers", "sat"]
FILE_NAMES: dict[Layout, str] = {"diffusers": "pytorch_lora_weights.safetensors", "sat": "lora_sat.safetensors"}
# Of names in diffusers' files; files of peft have another one.
PREFIX, PEFT_PREFIX = "transformer.", "base_model.model."
SAT_PREFIX = "model.diffusion_model."
# Path of a layer -> the module of a block's attention that has it in SAT, and its number among the pairs there.
SAT_LAYERS = {
    "blocks/layers/attention/query": ("query_key_value", 0),
    "blocks/layers/attention/key": ("query_key_value", 1),
    "blocks/layers/attention/value": ("query_key_value", 2),
    "blocks/layers/attention/output": ("dense", 0),
}
METADATA = "lora_adapter_metadata"
# What SAT's LoraMixin has unless it is told otherwise; its files do not say.
SAT_ALPHA = 1.0
# Name of the transform of a kernel -> those of its two factors. Only the side with patches is rearranged.
_PATCHES = {"patch_convolution": pointwise(2), "patch_linear": LINEAR}


@dataclasses.dataclass(frozen=True)
class LoraFile:
    """The adapter in a file.

    Attributes:
      factors: float32 arrays, as `jvgen.nn.lora.Factors` has them.
      rank: of all layers.
      alpha: the updates are alpha / rank times the products of the factors.
    """

    factors: Parameters
    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        """Factor on the products of the factors."""
        return self.alpha / self.rank


def file_of(path: str | Path) -> Path:
    """The file of an adapter that is named by itself or by its folder; it need not exist."""
    path = as_path(path)
    return path / FILE_NAMES["diffusers"] if path.is_dir() else path


def is_lora(path: str | Path) -> bool:
    """Whether a path is a file, or a folder with a file, that holds a LoRA adapter in one of the two layouts."""
    file = file_of(path)
    if not file.is_file() or file.suffix != ".safetensors":
        return False
    return any(".lora_A." in name or ".matrix_A." in name for name in open_file(file))


def read_lora(path: str | Path, config: VideoDiTConfig) -> LoraFile:
    """The adapter in a file, for a denoiser.

    Args:
      path: .safetensors file (.bin or .pt with torch), or a folder with `pytorch_lora_weights.safetensors`. A
        checkpoint of SAT may hold the network too.
      config: of the denoiser.

    Raises:
      ValueError: no such file.
      UnreadableFile: a corrupt file.
      WeightError: no adapter, one whose layers differ in rank or alpha, or that of another network: lists the tensors
        that are missing, not expected, or of another shape.
    """
    file = file_of(path)
    if not file.is_file():
        raise ValueError(
            f"LoRA {str(path)!r}: no such file; give a .safetensors file, or a folder with {FILE_NAMES['diffusers']}, "
            "as `jvgen export RUN --to DIR` writes of a run."
        )
    tensors = open_file(file)
    layout: Layout = "sat" if any(".matrix_A." in name for name in tensors) else "diffusers"
    found = {name: tensors[name] for name in tensors if layout == "diffusers" or ".matrix_" in name}
    alphas = {name: float(found.pop(name).reshape(())) for name in tuple(found) if name.endswith(".alpha")}
    layers = linear_layers(Network.of(lambda rngs: VideoDiT(config, rngs=rngs)))
    table = _table(config, layers, layout)
    paths = {
        entry.ours.rpartition("/")[0]
        for entry in table.entries
        for name in (entry.theirs, *entry.aliases)
        if any(name.replace(LAYER, str(layer)) in found for layer in range(config.layers))
    }
    ranks = {array.shape[0] for name, array in found.items() if ".lora_A." in name or ".matrix_A." in name}
    if not paths or not ranks:
        raise WeightError(
            f"{file} is no LoRA adapter of a CogVideoX transformer: it has tensors such as "
            f"{', '.join(sorted(tensors)[:3])}. Expected are names such as "
            f"{PREFIX}transformer_blocks.0.attn1.to_q.lora_A.weight, or SAT's matrix_A and matrix_B."
        )
    if len(ranks) > 1:
        raise WeightError(f"{file}: layers have the ranks {sorted(ranks)}; only one rank for all is supported.")
    rank = ranks.pop()
    alpha = SAT_ALPHA if layout == "sat" else _alpha(tensors, alphas, rank, file)
    shapes = {}
    for name in sorted(paths):
        kernel = layers[name][0]
        *stack, features_in, features_out = kernel.shape
        for part, shape in ((DOWN, (features_in, rank)), (UP, (rank, features_out))):
            shapes[f"{name}/{part}"] = np.broadcast_to(np.zeros((), np.float32), (*stack, *shape))
    kept = WeightMap(tuple(entry for entry in table.entries if entry.ours in shapes))
    try:
        factors = kept.from_torch(found, nested.unflatten(shapes))
    except WeightError as error:
        raise WeightError(
            f"{file} is the LoRA adapter of another network than this one with {config.layers} blocks of width "
            f"{config.width}: {error}"
        ) from error
    return LoraFile(factors, rank, alpha)


def write_lora(
    path: str | Path,
    config: VideoDiTConfig,
    factors: Parameters,
    scale: float,
    *,
    layout: Layout = "diffusers",
    dtype: str = "float32",
) -> Path:
    """Write an adapter as one file; returns its path.

    `scale` is multiplied into the second factors, so that alpha is the rank (in SAT's layout: 1) for all readers.

    Args:
      path: .safetensors file to create; it is written completely or not at all.
      config, factors: of the denoiser, and its adapter.
      scale: alpha / rank of the run.
      layout: names of diffusers or of SAT.
      dtype: "float32", "bfloat16" or "float16".

    Raises:
      ExportError: a file in the way, an unknown dtype, or layers that have no LoRA in SAT.
      NotFinite: see `jvgen.finite.narrowed`.
    """
    path = as_path(path)
    if dtype not in FILE_DTYPES:
        raise ExportError(f"dtype = {dtype!r}: weights are written as one of {', '.join(FILE_DTYPES)}.")
    if path.exists():
        raise ExportError(f"{path} exists; give another name or remove it.")
    layers = pairs(factors)
    others = [name for name in layers if layout == "sat" and name not in SAT_LAYERS]
    if others:
        raise ExportError(f"--layout sat: SAT has a LoRA for attention only, and this run one for {', '.join(others)}.")
    rank = next(iter(layers.values()))[DOWN].shape[-1]
    # SAT multiplies by 1 / rank.
    factor = np.float32(scale * (rank / SAT_ALPHA if layout == "sat" else 1.0))
    scaled = nested.map_with_path(
        lambda name, leaf: np.asarray(leaf, np.float32) * (factor if name.endswith(UP) else np.float32(1)), factors
    )
    table, kind = _table(config, layers, layout), FILE_DTYPES[dtype]
    specs = {name: TensorSpec(tuple(shape), kind) for name, shape in table.torch_shapes(scaled).items()}
    tensors = ((name, narrowed(name, np.asarray(array), kind)) for name, array in table.to_torch(scaled))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with local_file(path) as partial:
            write(partial, specs, tensors)
            digest = file_digest(partial, reread=True)
        add_digest(path, digest)
    except OSError as error:
        raise ExportError(f"writing {path} failed: {error.strerror or error}. Nothing of it is left.") from error
    return path


def _table(config: VideoDiTConfig, layers: Collection[str], layout: Layout) -> WeightMap:
    """Names and layouts of the factors of these layers (for SAT, of those that it has)."""
    entries = []
    for row in weight_map(config).entries:
        name = row.ours.removesuffix("/kernel")
        if name == row.ours or name not in layers:
            continue
        if layout == "diffusers":
            down, up = _factor_transforms(row)
            stem = row.theirs.removesuffix(".weight")
            theirs = {part: f"{stem}.lora_{letter}.weight" for part, letter in ((DOWN, "A"), (UP, "B"))}
            aliases = ("", PEFT_PREFIX)
            prefix = PREFIX
        else:
            if name not in SAT_LAYERS:
                continue
            module, number = SAT_LAYERS[name]
            down, up = LINEAR, LINEAR
            stem = f"transformer.layers.{LAYER}.attention.{module}.matrix"
            theirs = {part: f"{stem}_{letter}.{number}" for part, letter in ((DOWN, "A"), (UP, "B"))}
            prefix, aliases = SAT_PREFIX, ("",)
        for part, transform in ((DOWN, down), (UP, up)):
            names = tuple(f"{alias}{theirs[part]}" for alias in aliases)
            entries.append(Entry(f"{name}/{part}", f"{prefix}{theirs[part]}", transform, aliases=names))
    return WeightMap(tuple(entries))


def _factor_transforms(row: Entry) -> tuple:
    """Layouts of the two factors, given that of the kernel."""
    if row.transform.name in _PATCHES:
        return row.transform, _PATCHES[row.transform.name]
    return LINEAR, row.transform


def _alpha(tensors: Mapping[str, np.ndarray], alphas: Mapping[str, float], rank: int, file: Path) -> float:
    """Alpha of all layers: from tensors, or from peft's configuration in the header; otherwise the rank."""
    header = tensors.metadata if isinstance(tensors, SafetensorsFile) else {}
    if METADATA in header:
        with reading(file, f"has a {METADATA} in its header that is not JSON"):
            values = json.loads(header[METADATA])
        values = {name.removeprefix(PREFIX): value for name, value in values.items()}
        if values.get("use_dora"):
            raise WeightError(f"{file} is a DoRA adapter, which is not supported; give a LoRA adapter.")
        alphas = {**alphas, "": float(values.get("lora_alpha") or rank), **(values.get("alpha_pattern") or {})}
        if values.get("use_rslora"):
            # Of rank-stabilized LoRA: its updates are alpha / sqrt(rank) times the products.
            alphas = {name: alpha * math.sqrt(rank) for name, alpha in alphas.items()}
    elif alphas and len(alphas) < sum(".lora_A." in name for name in tensors):
        # Layers without one have the rank.
        alphas = {**alphas, "": float(rank)}
    found = set(alphas.values()) or {float(rank)}
    if len(found) > 1:
        raise WeightError(f"{file}: layers have the alphas {sorted(found)}; only one alpha for all is supported.")
    return found.pop()
