"""Files of the LoRA adapter of one network: diffusers' `pytorch_lora_weights.safetensors`, those of SAT and of peft.

In diffusers a layer is named as its kernel is ("transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"), and so it
is in peft ("base_model.model.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight"), whose `adapter_config.json`
beside the file lists the layers; older files have `lora.down` for lora_A and `lora.up` for lora_B. In SAT
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
from jvgen.config import Config
from jvgen.finite import narrowed
from jvgen.interop.digest import file_digest
from jvgen.interop.file_digests import add_digest
from jvgen.interop.formats import format_of
from jvgen.interop.from_torch import open_file
from jvgen.interop.safetensors_file import SafetensorsFile, TensorSpec, write
from jvgen.interop.to_torch import FILE_DTYPES, ExportError
from jvgen.models.video_dit.config import VideoDiTConfig
from jvgen.models.weight_map import LAYER, LINEAR, Entry, WeightError, WeightMap, pointwise
from jvgen.nn.lora import DOWN, UP, linear_layers, pairs
from jvgen.nn.network import Parameters
from jvgen.storage import Path, as_path, local_copy, local_file, read_json_object, reading, write_text

Layout = Literal["diffusers", "sat", "peft"]
FILE_NAMES: dict[Layout, str] = {
    "diffusers": "pytorch_lora_weights.safetensors",
    "sat": "lora_sat.safetensors",
    "peft": "adapter_model.safetensors",
}
# Beside peft's file: rank, alpha and the names of the layers.
PEFT_CONFIG = "adapter_config.json"
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
      absent: blocks that the file has no LoRA for, by path of the layer; their factors are zero.
    """

    factors: Parameters
    rank: int
    alpha: float
    absent: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    @property
    def scale(self) -> float:
        """Factor on the products of the factors."""
        return self.alpha / self.rank


def layout_of(config: Config) -> Layout:
    """The layout of the libraries that load the adapter of a network: diffusers' for a denoiser, peft's for others."""
    return "diffusers" if isinstance(config, VideoDiTConfig) else "peft"


def file_of(path: str | Path) -> Path:
    """The file of an adapter that is named by itself or by its folder; it need not exist."""
    path = as_path(path)
    if not path.is_dir():
        return path
    names = (FILE_NAMES["diffusers"], FILE_NAMES["peft"])
    return next((path / name for name in names if (path / name).is_file()), path / names[0])


def is_lora_file(file: Path) -> bool:
    """Whether a file, which need not exist, holds a LoRA adapter."""
    if not file.is_file() or file.suffix != ".safetensors":
        return False
    return any(".lora_A." in name or ".matrix_A." in name for name in map(_current_name, open_file(file)))


def read_lora(path: str | Path, config: Config) -> LoraFile:
    """The adapter in a file, for a network. Blocks that it leaves out (peft's `layers_to_transform`) get zeros.

    Args:
      path: .safetensors file (.bin or .pt with torch), or a folder with `pytorch_lora_weights.safetensors` or peft's
        `adapter_model.safetensors`. A checkpoint of SAT may hold the network too.
      config: of the network.

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
    layout = _layout_in(tensors, config)
    found = {_current_name(name): tensors[name] for name in tensors if layout != "sat" or ".matrix_" in name}
    alphas = {name: float(found.pop(name).reshape(())) for name in tuple(found) if name.endswith(".alpha")}
    form = format_of(config)
    layers = linear_layers(form.network(config))
    table = _table(config, layers, layout)
    paths = _paths_in(found, table, config)
    ranks = {array.shape[0] for name, array in found.items() if ".lora_A." in name or ".matrix_A." in name}
    if not paths or not ranks:
        sat = ", or SAT's matrix_A and matrix_B" if isinstance(config, VideoDiTConfig) else ""
        raise WeightError(
            f"{file} is no LoRA adapter of a {form.class_name} that can be read: it has tensors such as "
            f"{', '.join(sorted(tensors)[:3])}. Expected are names such as "
            f"{table.entries[0].theirs.replace(LAYER, '0')}{sat}."
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
    zeros, absent = _absent_blocks(kept, found, nested.unflatten(shapes))
    found |= zeros
    try:
        factors = kept.from_torch(found, nested.unflatten(shapes))
    except WeightError as error:
        raise WeightError(
            f"{file} is the LoRA adapter of another network than this one with {config.layers} blocks of width "
            f"{config.width}: {error}"
        ) from error
    return LoraFile(factors, rank, alpha, absent)


def _current_name(name: str) -> str:
    """The name of a factor in today's files of diffusers and peft."""
    return name.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B.")


def _absent_blocks(
    table: WeightMap, names: Collection[str], shapes: Parameters
) -> tuple[dict[str, np.ndarray], dict[str, tuple[int, ...]]]:
    """Zeros for the pairs of factors that a file has no part of, and the blocks that these are in by path."""
    torch_shapes, parts, zeros, absent = table.torch_shapes(shapes), {}, {}, {}
    for entry in table.entries:
        parts.setdefault(entry.ours.rpartition("/")[0], []).append(entry)
    for path, entries in parts.items():
        for block in range(nested.flatten(shapes)[entries[0].ours].shape[0]):
            every = [[name.replace(LAYER, str(block)) for name in (e.theirs, *e.aliases)] for e in entries]
            # A tensor without the other of its pair is refused as before.
            if LAYER in entries[0].theirs and not any(name in names for pair in every for name in pair):
                absent[path] = (*absent.get(path, ()), block)
                zeros |= {name: np.zeros(torch_shapes[name], np.float32) for name, *_ in every}
    return zeros, absent


def is_lora_of(file: Path, config: Config) -> bool:
    """Whether a file has layers with the names of a network's; of which sizes they are is not compared."""
    tensors = open_file(file)
    table = _table(config, linear_layers(format_of(config).network(config)), _layout_in(tensors, config))
    return bool(_paths_in([_current_name(name) for name in tensors], table, config))


def _layout_in(tensors: Collection[str], config: Config) -> Layout:
    in_sat = isinstance(config, VideoDiTConfig) and any(".matrix_A." in name for name in tensors)
    return "sat" if in_sat else layout_of(config)


def _paths_in(names: Collection[str], table: WeightMap, config: Config) -> set[str]:
    """The layers that a file's names are of."""
    return {
        entry.ours.rpartition("/")[0]
        for entry in table.entries
        for name in (entry.theirs, *entry.aliases)
        if any(name.replace(LAYER, str(layer)) in names for layer in range(config.layers))
    }


def write_lora(
    path: str | Path,
    config: Config,
    factors: Parameters,
    scale: float,
    *,
    layout: Layout | None = None,
    dtype: str = "float32",
) -> Path:
    """Write an adapter as one file, in peft's layout with `adapter_config.json` beside it; returns its path.

    `scale` is multiplied into the second factors, so that alpha is the rank (in SAT's layout: 1) for all readers.

    Args:
      path: .safetensors file to create; it is written completely or not at all.
      config, factors: of the network, and its adapter.
      scale: alpha / rank of the run.
      layout: names of diffusers, SAT or peft; by default as `layout_of` says.
      dtype: "float32", "bfloat16" or "float16".

    Raises:
      ExportError: a file in the way, an unknown dtype, or layers that have no LoRA in SAT.
      NotFinite: see `jvgen.finite.narrowed`.
    """
    path, layout = as_path(path), layout or layout_of(config)
    if dtype not in FILE_DTYPES:
        raise ExportError(f"dtype = {dtype!r}: weights are written as one of {', '.join(FILE_DTYPES)}.")
    layers = pairs(factors)
    others = [name for name in layers if not isinstance(config, VideoDiTConfig) or name not in SAT_LAYERS]
    if others and layout == "sat":
        raise ExportError(
            f"--layout sat: SAT has a LoRA for attention only, that of a denoiser, and this run one for "
            f"{', '.join(others)} of a {format_of(config).class_name}."
        )
    if path.exists():
        raise ExportError(f"{path} exists; give another name or remove it.")
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
        if layout == "peft":
            _write_peft_config(path.with_name(PEFT_CONFIG), rank, specs)
    except OSError as error:
        raise ExportError(f"writing {path} failed: {error.strerror or error}. Nothing of it is left.") from error
    return path


def _write_peft_config(path: Path, rank: int, names: Collection[str]) -> None:
    """What `peft.PeftModel.from_pretrained` reads beside the tensors of these names."""
    layers = sorted({name.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0] for name in names})
    values = {
        "peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": layers, "lora_dropout": 0.0,
        "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "base_model_name_or_path": None,
        "task_type": None,
    }  # fmt: skip
    write_text(path, json.dumps(values, indent=2) + "\n")
    add_digest(path, file_digest(path))


def _table(config: Config, layers: Collection[str], layout: Layout) -> WeightMap:
    """Names and layouts of the factors of these layers (for SAT, of those that it has)."""
    entries = []
    for row in format_of(config).weight_map(config).entries:
        name = row.ours.removesuffix("/kernel")
        if name == row.ours or name not in layers:
            continue
        if layout != "sat":
            down, up = _factor_transforms(row)
            stem = row.theirs.removesuffix(".weight")
            theirs = {part: f"{stem}.lora_{letter}.weight" for part, letter in ((DOWN, "A"), (UP, "B"))}
            prefix, aliases = (PREFIX, ("", PEFT_PREFIX)) if layout == "diffusers" else (PEFT_PREFIX, ("",))
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
    """Alpha of all layers: from tensors, or from peft's configuration (in the header, or beside); else the rank."""
    header, beside = tensors.metadata if isinstance(tensors, SafetensorsFile) else {}, file.with_name(PEFT_CONFIG)
    values = None
    if METADATA in header:
        with reading(file, f"has a {METADATA} in its header that is not JSON"):
            values = json.loads(header[METADATA])
        values = {name.removeprefix(PREFIX): value for name, value in values.items()}
    elif file.stem == as_path(FILE_NAMES["peft"]).stem and beside.is_file():
        values = read_json_object(local_copy(beside))
    if values is not None:
        if values.get("use_dora"):
            raise WeightError(f"{file} is a DoRA adapter, which is not supported; give a LoRA adapter.")
        alphas = {**alphas, "": float(values.get("lora_alpha") or rank), **(values.get("alpha_pattern") or {})}
        if values.get("use_rslora"):
            # Of rank-stabilized LoRA: its updates are alpha / sqrt(rank) times the products.
            alphas = {name: alpha * math.sqrt(rank) for name, alpha in alphas.items()}
    elif alphas and len(alphas) < sum(".lora_A." in _current_name(name) for name in tensors):
        # Layers without one have the rank.
        alphas = {**alphas, "": float(rank)}
    found = set(alphas.values()) or {float(rank)}
    if len(found) > 1:
        raise WeightError(f"{file}: layers have the alphas {sorted(found)}; only one alpha for all is supported.")
    return found.pop()
