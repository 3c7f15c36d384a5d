"""Write a denoiser with the tensor names of SAT, the code that CogVideoX and RepVideo were trained with.

One safetensors file. In SAT: `model.load_state_dict(safetensors.torch.load_file(FILE), strict=True)` on the denoiser,
or with the prefix of its checkpoints on the whole engine. `import_folder` reads files of that code.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from jvgen.config import Config
from jvgen.finite import narrowed
from jvgen.interop.digest import file_digest
from jvgen.interop.file_digests import add_digest
from jvgen.interop.safetensors_file import TensorSpec, write
from jvgen.interop.to_torch import FILE_DTYPES, ExportError
from jvgen.models.video_dit.config import VideoDiTConfig
from jvgen.models.video_dit.torch_map import sat_tables, weight_map_sat
from jvgen.storage import Path, as_path, local_file

# Prefix of the names in checkpoints.
PREFIX = "model.diffusion_model."


def export_sat(
    config: Config, parameters: Mapping[str, Any], path: str | Path, *, dtype: str = "float32", prefix: str = PREFIX
) -> Path:
    """Write one denoiser, its gates and the fixed tables of positions to a file; returns the path.

    Args:
      config, parameters: of the denoiser.
      path: safetensors file to create; it is written completely or not at all.
      dtype: "float32", "bfloat16" or "float16": dtype of the tensors in the file.
      prefix: of every name; "" for the denoiser alone.

    Raises:
      ExportError: a network without SAT names, a file in the way, an unknown dtype.
      ValueError: a network that the SAT code does not have.
      NotFinite: see `jvgen.finite.narrowed`.
    """
    path = as_path(path)
    if not isinstance(config, VideoDiTConfig):
        raise ExportError(f"{type(config).__name__}: the SAT layout is of CogVideoX's and RepVideo's denoiser only.")
    if dtype not in FILE_DTYPES:
        raise ExportError(f"dtype = {dtype!r}: weights are written as one of {', '.join(FILE_DTYPES)}.")
    if path.exists():
        raise ExportError(f"{path} exists; give another name or remove it.")
    table, kind = weight_map_sat(config, prefix), FILE_DTYPES[dtype]
    tables = sat_tables(config, prefix)
    shapes = {**table.torch_shapes(parameters), **{name: array.shape for name, array in tables.items()}}
    specs = {name: TensorSpec(tuple(shape), kind) for name, shape in shapes.items()}

    def tensors():
        for name, array in itertools.chain(table.to_torch(parameters), tables.items()):
            yield name, narrowed(name, np.asarray(array), kind)

    try:
        with local_file(path) as partial:
            write(partial, specs, tensors())
            digest = file_digest(partial, reread=True)
        add_digest(path, digest)
    except OSError as error:
        raise ExportError(f"writing {path} failed: {error.strerror or error}. Nothing of it is left.") from error
    return path
