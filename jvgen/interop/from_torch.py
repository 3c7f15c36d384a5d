"""Read networks from local PyTorch files: a folder with config.json, or a single weights file."""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from jvgen import nested
from jvgen.config import Config, validate_tree
from jvgen.interop.extra_weights import read_extra_weights, with_extra_weights
from jvgen.interop.file_digests import check_digests
from jvgen.interop.formats import Format, format_named, format_of
from jvgen.interop.pickle_file import open_pickle
from jvgen.interop.safetensors_file import SafetensorsFile
from jvgen.interop.weights_names import CONFIG, PICKLES, is_index, weights_file
from jvgen.models.weight_map import WeightError
from jvgen.nn.network import Network, Parameters
from jvgen.storage import Path, UnreadableFile, as_path, is_remote, local_copy, read_json_object

# Names of the matrices of a LoRA adapter in diffusers and peft, in kohya's files and in SAT.
_ADAPTER = re.compile(r"(?:^|[._])lora(?:_[AB]|_up|_down|_unet|_te)?[._]|\bmatrix_[AB]\b")
# Those that `jvgen.interop.lora_file` reads.
_READ_ADAPTER = re.compile(r"[._]lora_[AB]\.|\.matrix_[AB]\.|\.lora\.(?:down|up)\.")
_ADAPTER_FILES = ("pytorch_lora_weights", "adapter_model")


def import_folder(
    path: str | Path,
    config: Config | None = None,
    *,
    shapes: Callable[[Network], Parameters] | None = None,
    place: Callable[[str, np.ndarray], Any] | None = None,
) -> tuple[Config, Parameters]:
    """The configuration and the parameters of the network in a folder or file.

    Tensors are read one at a time into the parameters, as numpy arrays.

    Args:
      path: folder with `config.json` and weights as diffusers or transformers write them, whole or in shards; or one
        `.safetensors` file or index of shards (or `.bin`, `.pt` when torch is installed), also of a variant.
      config: of the network; needed only for a file without a `config.json` beside it.
      shapes: nested dict of `jax.ShapeDtypeStruct` with the dtypes to read into; default float32.
      place: see `jvgen.models.weight_map.WeightMap.from_torch`.

    Raises:
      ValueError: no such path, an unknown class, quantized weights, a pickle without torch, an index that names files
        outside of the folder.
      UnreadableFile: a file of another kind than its name says, or a corrupt one.
      DamagedExport: an exported folder whose files are not those that were exported.
      WeightError: lists all tensors that are missing, not expected, or of another shape or kind of number; a LoRA
        adapter; values that are not finite.
    """
    path = _existing(path)
    check_files(path)
    config = read_config(path) if config is None else config
    form = format_of(config)
    reader, network = open_weights(path, form), form.network(config)
    with _naming(path, form):
        wanted = network.shapes if shapes is None else shapes(network)
        table = form.weight_map(config, reader)
        if form.extra_weight_map(config) is None:
            return config, table.from_torch(reader, wanted, place)
        wanted, extra = nested.split(wanted, table.covers)
        parameters = table.from_torch(reader, wanted, place)
        return config, nested.merge(parameters, read_extra_weights(_folder(path), form, config, extra, place))


def check_weights(path: str | Path, config: Config | None = None) -> None:
    """Raise as `import_folder` does for weights that are missing, do not fit or are damaged.

    Reads names, shapes and dtypes only, unless there are digests to check.

    Args:
      path, config: as in `import_folder`.
    """
    check_files(path)
    config = read_config(path) if config is None else config
    form = format_of(config)
    with _naming(as_path(path), form):
        reader, shapes = open_weights(_existing(path), form), form.network(config).shapes
        table = form.weight_map(config, reader)
        table.check(reader, nested.split(shapes, table.covers)[0] if form.extra_weight_map(config) else shapes)


@contextlib.contextmanager
def _naming(path: Path, form: Format) -> Iterator[None]:
    """Errors about weights start with the path and the class."""
    try:
        yield
    except WeightError as error:
        raise WeightError(f"{path} as {form.class_name}: {error}") from error


def read_config(path: str | Path) -> Config:
    """The configuration of the network in a folder, or of a file in it; reads no tensors.

    Raises:
      ValueError: no such path, no config.json, an unknown class, quantized weights, or values that the network cannot
        have.
      WeightError: a LoRA adapter.
    """
    path = _existing(path)
    folder = _folder(path)
    file = folder / CONFIG
    check_digests(folder, (CONFIG,))
    if not file.is_file():
        raise _without_config(path, folder)
    values = read_json_object(file)
    _refuse_quantized(values, file)
    form = format_named(values, str(file))
    values |= form.json_from_tensors(values, lambda: open_weights(path, form))
    try:
        config = form.from_json(values)
        validate_tree(config)
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError) as error:
        reason = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{file} does not describe a {form.class_name} that can be read: {reason}") from error
    return with_extra_weights(folder, form, config)


def _without_config(path: Path, folder: Path) -> ValueError:
    """The error for weights without config.json."""
    adapters = [file for stem in _ADAPTER_FILES for file in sorted(folder.glob(f"{stem}*"))]
    for file in [path] if path.is_file() else adapters:
        # It says what is wrong with this file, if something is.
        _refuse_adapter(open_file(file), file)
    inside = sorted(child.parent.name for child in folder.glob(f"*/{CONFIG}"))
    hint = "It describes the network of the weights: name a folder that `save_pretrained` or `jvgen export` wrote."
    if inside:
        hint = f"It has networks in subfolders; give one of: {', '.join(inside)}."
    return ValueError(f"{folder} has no config.json. {hint}")


def _refuse_quantized(values: Mapping[str, Any], file: Path) -> None:
    quantization = values.get("quantization_config")
    if not quantization:
        return
    settings = quantization if isinstance(quantization, Mapping) else {}
    method = settings.get("quant_method", "an unknown method")
    details = [name for name, value in settings.items() if name.startswith("load_in_") and value is True]
    details += [f"{name} = {settings[name]}" for name in ("quant_type", "weights_dtype", "bits") if settings.get(name)]
    how = f"{method} ({', '.join(details)})" if details else method
    raise ValueError(
        f"{file}: quantization_config says that these weights are quantized with {how}; jvgen reads floating-point "
        "weights only. "
        "Dequantize them: load them with the library that wrote them, call `model.dequantize()` and "
        "`model.save_pretrained(FOLDER)`; or take the weights that were published before quantization."
    )


def check_files(path: str | Path) -> None:
    """Raise `DamagedExport` for a folder, or a file in it, that is not what was exported; see `check_digests`."""
    path = _existing(path)
    one_file = path.is_file() and not is_index(path.name)
    check_digests(_folder(path), (path.name, CONFIG) if one_file else None)


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _existing(path: str | Path) -> Path:
    path = as_path(path)
    # A file's config.json and other shards are beside it.
    copy = local_copy(path.parent) / path.name if is_remote(path) and path.is_file() else local_copy(path)
    if not copy.exists():
        raise ValueError(f"weights {str(path)!r}: no such file or folder.")
    return copy


def with_variant(path: Path, variant: str | None) -> Path:
    """The file with a variant ("fp16", "bf16") of the weights in a folder, to give to the other functions here.

    Args:
      path: folder of one network as diffusers or transformers write it.
      variant: as in `from_pretrained`; None for the path itself.

    Raises:
      ValueError: no such folder, or the folder has no such variant; those that it has are named.
    """
    if variant is None:
        return path
    if not (path / CONFIG).is_file():
        raise ValueError(f"--variant {variant}: {path} is not a folder with {CONFIG} and weights.")
    folder = _existing(path)
    form = format_named(read_json_object(folder / CONFIG), str(path / CONFIG))
    return path / weights_file(folder, form, variant).name


def open_weights(path: Path, form: Format) -> Mapping[str, np.ndarray]:
    """The tensors of a folder or file by name, each read on access.

    Raises:
      ValueError: no weights.
      UnreadableFile: a corrupt file.
      WeightError: a LoRA adapter.
    """
    file = path if path.is_file() else weights_file(path, form)
    tensors = open_file(file)
    # Networks of ours may have adapters of their own.
    if form.library != "jvgen":
        _refuse_adapter(tensors, file)
    return tensors


def open_file(path: Path) -> Mapping[str, np.ndarray]:
    """The tensors of a file of any kind by name, each read on access.

    Raises:
      ValueError: an unknown kind of file.
      UnreadableFile: a corrupt file.
    """
    if is_index(path.name):
        return Shards(path)
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in PICKLES:
        return open_pickle(path)
    kinds = ", ".join(PICKLES)
    raise ValueError(f"{path}: weights are read from .safetensors files (or {kinds}), not {path.suffix!r}.")


def _refuse_adapter(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    adapters = [name for name in tensors if _ADAPTER.search(name)]
    if adapters:
        use = (
            "Sample with it by `jvgen sample --weights DIR --lora FILE`, or train it further: `jvgen import FILE "
            "--config` of a run with task.lora."
        )
        if not any(_READ_ADAPTER.search(name) for name in adapters):
            use = "Its names are not among those that jvgen reads; save it with the names of diffusers, peft or SAT."
        raise WeightError(
            f"{path} is a LoRA adapter ({len(adapters)} of its {len(tensors)} tensors are like {adapters[0]}), which "
            f"changes the weights of a network and does not hold them. {use}"
        )


class Shards(Mapping[str, np.ndarray]):
    """The tensors of several files by name, as listed in an index file.

    Raises:
      ValueError: the index is corrupt, or names a file that is missing or outside of its folder.
    """

    def __init__(self, index: Path):
        places = read_json_object(index).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise UnreadableFile(f"{index} has no weight_map. Get the file again.")
        self._files: dict[str, Any] = {}
        for shard in sorted({str(place) for place in places.values()}):
            if shard != as_path(shard).name or shard in ("", ".", "..") or "\\" in shard or "\0" in shard:
                raise ValueError(f"{index} names the shard {shard!r}: give plain file names in the same folder.")
            if not (index.parent / shard).is_file():
                raise ValueError(f"{index} names the shard {shard!r}, which does not exist. Get the file again.")
            if is_index(shard):
                raise ValueError(f"{index} names the shard {shard!r}, which is an index itself. Get the file again.")
            self._files[shard] = open_file(index.parent / shard)
        self._places: dict[str, str] = {}
        for shard, file in self._files.items():
            for name in file:
                self._places[name] = shard
        lost = sorted(name for name, shard in places.items() if self._places.get(name) != shard)
        if lost:
            raise ValueError(f"{index}: tensors are missing from the shards that it names: {', '.join(lost)}.")

    def __getitem__(self, name: str) -> np.ndarray:
        return self._files[self._places[name]][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header of its file."""
        return self._files[self._places[name]].shape(name)

    def dtype(self, name: str) -> np.dtype:
        """Dtype of a tensor, from the header of its file."""
        return self._files[self._places[name]].dtype(name)
