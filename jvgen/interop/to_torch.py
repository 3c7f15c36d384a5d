"""Write networks as folders that diffusers and transformers load, one tensor at a time and atomically."""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jvgen import nested
from jvgen.config import Config
from jvgen.finite import narrowed
from jvgen.interop.extra_weights import write_extra_weights
from jvgen.interop.file_digests import write_digests
from jvgen.interop.formats import Format, format_of
from jvgen.interop.safetensors_file import TensorSpec, write
from jvgen.storage import Path, as_path, is_remote, partial_folder, remove_dead_partials, remove_tree, upload_folder

FILE_DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
SHARD_BYTES = 5_000_000_000
# Lists the networks of an export with the classes that load them; a pipeline's also names the class of the pipeline.
INDEX = "model_index.json"

# Parameters of a network, or what reads them when they are written.
Weights = Mapping[str, Any] | Callable[[], Mapping[str, Any]]


class ExportError(ValueError):
    """An export that could not be written; nothing of it is left behind."""


def export_network(
    config: Config,
    parameters: Mapping[str, Any],
    folder: str | Path,
    *,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> Path:
    """Write one network so that the class of the original library loads it strictly; returns the folder.

    Tensors are converted and written one at a time. The folder is written completely or not at all.

    Args:
      config: of the network; determines the format (`jvgen.interop.formats`).
      parameters: nested dict of numpy or JAX arrays.
      folder: to create.
      dtype: "float32", "bfloat16" or "float16": dtype of the tensors in the file.
      shard_bytes: largest size of a weights file; larger weights are split into several with an index.
      overwrite: replace a folder that exists.

    Raises:
      ExportError: the folder exists, the disk is full or cannot be written, an unknown dtype.
      WeightError: the parameters are not those of the configuration.
      NotFinite: a tensor holds NaN or infinity, or would in `dtype`; names the tensor, its largest value and the limit.
    """
    return export_networks(
        {"": config}, {"": parameters}, folder, dtype=dtype, shard_bytes=shard_bytes, overwrite=overwrite
    )


def export_networks(
    configs: Mapping[str, Config],
    parameters: Mapping[str, Weights],
    folder: str | Path,
    *,
    files: Mapping[str, str | Path] | None = None,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> Path:
    """Write several networks, each to the subfolder of its name, and `model_index.json` that lists their classes.

    Every folder gets `jvgen_digests.json`, by which readers of this package notice damaged files.

    Args:
      configs, parameters: by network name. Parameters that are a function are read when they are written.
      files: text of further files, or local files to copy, by path relative to the folder; `model_index.json` among
        them replaces the list.
      folder, dtype, shard_bytes, overwrite: see `export_network`.

    Raises:
      ExportError, WeightError, NotFinite: see `export_network`.
    """
    folder = as_path(folder)
    if dtype not in FILE_DTYPES:
        raise ExportError(f"dtype = {dtype!r}: weights are written as one of {', '.join(FILE_DTYPES)}.")
    plans = {name: _Plan(config, parameters[name], FILE_DTYPES[dtype], shard_bytes) for name, config in configs.items()}
    texts = dict(files or {})
    if "" not in configs and INDEX not in texts:
        texts[INDEX] = _json({name: [p.format.library, p.format.class_name] for name, p in plans.items()})
    check_target(folder, overwrite, sum(plan.nbytes for plan in plans.values()))
    with complete_or_absent(folder, overwrite) as partial:
        for name, plan in plans.items():
            (partial / name).mkdir(parents=True, exist_ok=True)
            plan.write(partial / name)
        for name, text in texts.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            _write_text(partial / name, text) if isinstance(text, str) else _copy(text, partial / name)
        write_digests(partial)
    return folder


class _Plan:
    """The files of a network and their tensors."""

    def __init__(self, config: Config, parameters: Weights, dtype: np.dtype, shard_bytes: int):
        self.format: Format = format_of(config)
        self.json = self.format.to_json(config)
        self.config, self.dtype = config, dtype
        self.map, self.parameters = self.format.weight_map(config), parameters
        shapes, _ = self._split(self.format.network(config).shapes if callable(parameters) else parameters)
        self.specs = {name: TensorSpec(shape, dtype) for name, shape in self.map.torch_shapes(shapes).items()}
        self.nbytes = sum(spec.nbytes for spec in self.specs.values())
        self.shards: list[dict[str, TensorSpec]] = [{}]
        room = shard_bytes
        for name, spec in self.specs.items():
            if self.shards[-1] and spec.nbytes > room:
                self.shards.append({})
                room = shard_bytes
            self.shards[-1][name] = spec
            room -= spec.nbytes

    def _split(self, parameters: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Parameters that the format's class has, and those that it lacks."""
        if self.format.extra_weight_map(self.config) is None:
            return parameters, {}
        return nested.split(parameters, self.map.covers)

    def write(self, folder: Path) -> None:
        parameters, extra = self._split(self.parameters() if callable(self.parameters) else self.parameters)
        stem, count = self.format.weights_name, len(self.shards)
        names = [f"{stem}-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]
        if count == 1:
            names = [f"{stem}.safetensors"]
        stream = ((name, narrowed(name, array, self.dtype)) for name, array in self.map.to_torch(parameters))
        for file, specs in zip(names, self.shards, strict=True):
            write(folder / file, specs, stream)
        if count > 1:
            places = {name: file for file, specs in zip(names, self.shards, strict=True) for name in specs}
            index = {"metadata": {"total_size": self.nbytes}, "weight_map": places}
            _write_text(folder / f"{stem}.safetensors.index.json", _json(index))
        _write_text(folder / "config.json", _json(self.json))
        write_extra_weights(folder, self.format, self.config, extra, self.dtype)


def check_target(folder: Path, overwrite: bool, nbytes: int) -> None:
    """Raise `ExportError` unless an export of `nbytes` bytes can be written as this folder.

    What killed exports left beside it is removed first, so that it does not fill the disk.
    """
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"{folder} is a file; give a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ExportError(f"{folder} exists and is not empty; give another folder or remove it.")
    if not is_remote(folder):
        folder = folder.resolve()
        _check_replaceable(folder)
        for place in remove_dead_partials(folder):
            print(f"removed {place}, which an export that was killed had left")
    parent = pathlib.Path(tempfile.gettempdir()) if is_remote(folder) else folder.parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise ExportError(
            f"the disk of {parent} is too full: the export needs {nbytes / 1e6:,.1f} MB and "
            f"{free / 1e6:,.1f} MB are free. Nothing was written."
        )


def _check_replaceable(folder: pathlib.Path) -> None:
    """Raise `ExportError` for a local folder, without links in its path, that no other can take the place of."""
    if not folder.is_dir():
        return
    if pathlib.Path.cwd().is_relative_to(folder):
        what = "is the working directory, or above it"
    elif folder.is_mount() or str(folder) in _mount_points():
        what = "is a mount point"
    else:
        return
    raise ExportError(f"{folder} {what}, and an export takes a folder's place; give one in it, {folder / 'export'}.")


def _mount_points() -> set[str]:
    """As Linux lists them: folders of containers that are mounted from the same disk look like any other."""
    try:
        lines = pathlib.Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return set()
    return {line.split()[4].replace("\\040", " ") for line in lines}


@contextlib.contextmanager
def complete_or_absent(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside the target that replaces the target on success and is removed on failure.

    A target that is a link is replaced where the link leads.
    For a target in a bucket it is a temporary folder of this machine, uploaded on success: files that say what the
    folder holds come last.
    """
    if is_remote(folder):
        with tempfile.TemporaryDirectory(prefix="jvgen-export-") as partial:
            yield pathlib.Path(partial)
            remove_tree(folder)
            upload_folder(pathlib.Path(partial), folder, last=("config.json", INDEX))
        return
    folder = folder.resolve()
    partial = partial_folder(folder)
    previous = folder.parent / f".{folder.name}.previous-{os.getpid()}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        for place in [partial, *(path for path in partial.rglob("*") if path.is_dir())]:
            _sync_folder(place)
        if overwrite and folder.exists():
            folder.rename(previous)
        partial.rename(folder)
        _sync_folder(folder.parent)
    except OSError as error:
        reason = error.strerror or error
        raise ExportError(f"writing {folder} failed: {reason}. Nothing of the export is left.") from error
    finally:
        if previous.exists() and not folder.exists():
            previous.rename(folder)
        for leftover in (partial, previous):
            if leftover.exists():
                shutil.rmtree(leftover)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copy(source: Path, path: Path) -> None:
    shutil.copyfile(source, path)
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _write_text(path: Path, text: str) -> None:
    with path.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"
