"""Read networks from local PyTorch files: a folder with config.json, or a single weights file."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from jvgen import nested
from jvgen.config import Config
from jvgen.interop.extra_weights import read_extra_weights, with_extra_weights
from jvgen.interop.file_digests import check_digests
from jvgen.interop.formats import Format, format_named, format_of
from jvgen.interop.pickle_file import open_pickle
from jvgen.interop.safetensors_file import SafetensorsFile
from jvgen.models.weight_map import WeightError
from jvgen.nn.network import Network, Parameters
from jvgen.storage import Path, as_path, is_remote, local_copy, read_json_object

CONFIG = "config.json"
INDEX = ".index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


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
        `.safetensors` file (or `.bin`, `.pt` when torch is installed).
      config: of the network; needed only for a file without a `config.json` beside it.
      shapes: nested dict of `jax.ShapeDtypeStruct` with the dtypes to read into; default float32.
      place: see `jvgen.models.weight_map.WeightMap.from_torch`.

    Raises:
      ValueError: no such path, an unknown class, a corrupt file, a pickle without torch, an index that names files
        outside of the folder.
      DamagedExport: an exported folder whose files are not those that were exported.
      WeightError: lists all tensors that are missing, not expected, or of another shape.
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


def check_weights(path: str | Path) -> None:
    """Raise as `import_folder` does for weights that are missing, do not fit or are damaged.

    Reads names and shapes only, unless there are digests to check.
    """
    check_files(path)
    config = read_config(path)
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
      ValueError: no such path, no config.json, or an unknown class.
    """
    path = _existing(path)
    folder = _folder(path)
    file = folder / CONFIG
    check_digests(folder, (CONFIG,))
    if not file.is_file():
        inside = sorted(child.parent.name for child in folder.glob(f"*/{CONFIG}"))
        hint = "It describes the network of the weights."
        if inside:
            hint = f"It has networks in subfolders; give one of: {', '.join(inside)}."
        raise ValueError(f"{folder} has no config.json. {hint}")
    values = read_json_object(file)
    form = format_named(values, str(file))
    config = form.from_json(values | form.json_from_tensors(values, lambda: open_weights(path, form)))
    return with_extra_weights(folder, form, config)


def check_files(path: str | Path) -> None:
    """Raise `DamagedExport` for a folder, or a file in it, that is not what was exported; see `check_digests`."""
    path = _existing(path)
    one_file = path.is_file() and not path.name.endswith(INDEX)
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


def open_weights(path: Path, form: Format) -> Mapping[str, np.ndarray]:
    """The tensors of a folder or file by name, each read on access.

    Raises:
      ValueError: no weights.
    """
    if path.is_file():
        return _open_file(path)
    stems = (form.weights_name, *({"model", "diffusion_pytorch_model"} - {form.weights_name}))
    names = [stem + suffix for stem in (*stems, "pytorch_model") for suffix in (".safetensors", *PICKLES)]
    for name in names:
        if (path / name).is_file():
            return _open_file(path / name)
        if (path / (name + INDEX)).is_file():
            return Shards(path / (name + INDEX))
    found = ", ".join(sorted(child.name for child in path.iterdir())) or "nothing"
    raise ValueError(f"{path} has no weights: expected {names[0]} or {names[0]}{INDEX}. It has: {found}.")


def _open_file(path: Path) -> Mapping[str, np.ndarray]:
    if path.name.endswith(INDEX):
        return Shards(path)
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in PICKLES:
        return open_pickle(path)
    kinds = ", ".join(PICKLES)
    raise ValueError(f"{path}: weights are read from .safetensors files (or {kinds}), not {path.suffix!r}.")


class Shards(Mapping[str, np.ndarray]):
    """The tensors of several files by name, as listed in an index file.

    Raises:
      ValueError: the index is corrupt, or names a file that is missing or outside of its folder.
    """

    def __init__(self, index: Path):
        places = read_json_object(index).get("weight_map")
        if not isinstance(places, dict):
            raise ValueError(f"{index} has no weight_map.")
        self._files: dict[str, Any] = {}
        for shard in sorted({str(place) for place in places.values()}):
            if shard != as_path(shard).name or shard in ("", ".", "..") or "\\" in shard or "\0" in shard:
                raise ValueError(f"{index} names the shard {shard!r}: give plain file names in the same folder.")
            if not (index.parent / shard).is_file():
                raise ValueError(f"{index} names the shard {shard!r}, which does not exist. Get the file again.")
            self._files[shard] = _open_file(index.parent / shard)
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
