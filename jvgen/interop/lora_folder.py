"""A folder with the LoRA adapters of the networks of a task: that of a denoiser in the folder, others in subfolders.

lora/pytorch_lora_weights.safetensors          the denoiser's, for `load_lora_weights` of diffusers' pipelines
lora/text_encoder/adapter_model.safetensors    for `PeftModel.from_pretrained`, with adapter_config.json
"""

from collections.abc import Mapping

from jvgen.config import Config
from jvgen.interop.lora_file import (
    FILE_NAMES,
    Layout,
    LoraFile,
    file_of,
    is_lora_file,
    is_lora_of,
    layout_of,
    read_lora,
    write_lora,
)
from jvgen.nn.network import Parameters
from jvgen.storage import Path, as_path


def place_of(folder: Path, name: str, config: Config, layout: Layout | None = None) -> Path:
    """The file of the adapter of a network in a folder; it need not exist."""
    layout = layout or layout_of(config)
    place = folder / name if layout == "peft" else folder
    return place / FILE_NAMES[layout]


def is_lora(path: str | Path) -> bool:
    """Whether a path is a file that holds a LoRA adapter, or a folder with one, or with subfolders that have one."""
    path = as_path(path)
    subfolders = [place / FILE_NAMES["peft"] for place in path.iterdir()] if path.is_dir() else []
    return any(is_lora_file(file) for file in (file_of(path), *subfolders))


def adapter_files(path: str | Path, configs: Mapping[str, Config]) -> dict[str, Path]:
    """The files of adapters by network.

    Args:
      path: a file, or a folder with the files of one or several networks.
      configs: of the networks of a task that may have an adapter.

    Raises:
      UnreadableFile: a corrupt file.
    """
    path = as_path(path)
    places = {name: place_of(path, name, config) for name, config in configs.items()} if path.is_dir() else {}
    if found := {name: place for name, place in places.items() if place.is_file()}:
        return found
    file, (first, *_) = file_of(path), configs
    # A file whose names are of none of them is refused when it is read, as one of the first.
    named = (name for name, config in configs.items() if file.is_file() and is_lora_of(file, config))
    return {next(named, first): file}


def read_adapters(path: str | Path, configs: Mapping[str, Config]) -> dict[str, LoraFile]:
    """The adapters in a file or folder by network; arguments as in `adapter_files`.

    Raises:
      ValueError, UnreadableFile, WeightError: see `jvgen.interop.lora_file.read_lora`.
    """
    return {name: read_lora(file, configs[name]) for name, file in adapter_files(path, configs).items()}


def write_adapters(
    folder: Path,
    configs: Mapping[str, Config],
    factors: Parameters,
    scale: float,
    *,
    layout: Layout | None = None,
    dtype: str = "float32",
) -> list[Path]:
    """Write the adapters of several networks to a folder; returns their files.

    Args:
      configs, factors: by network.
      scale, layout, dtype: see `jvgen.interop.lora_file.write_lora`.

    Raises:
      ExportError, NotFinite: see `jvgen.interop.lora_file.write_lora`.
    """
    return [
        write_lora(place_of(folder, name, configs[name], layout), configs[name], own, scale, layout=layout, dtype=dtype)
        for name, own in factors.items()
    ]
