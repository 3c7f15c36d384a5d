"""Parameters that a library's class has no place for: in a file of ours beside its weights, with a JSON that says what.

The class loads its folder strictly, as if they were not there; reading the folder here brings them back.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jvgen.config import Config
from jvgen.interop.formats import Format
from jvgen.interop.safetensors_file import SafetensorsFile, TensorSpec, write
from jvgen.nested import flatten


def write_companion(folder: Path, form: Format, config: Config, rest: Mapping[str, Any], dtype: np.dtype) -> None:
    """Write the parameters that the library's weights leave out; nothing if there are none."""
    table = form.companion_map(config)
    if table is None:
        return
    specs = {name: TensorSpec(shape, dtype) for name, shape in table.torch_shapes(rest).items()}
    tensors = ((name, array.astype(dtype, copy=False)) for name, array in table.to_torch(rest))
    write(folder / f"{form.companion}.safetensors", specs, tensors)
    (folder / f"{form.companion}.json").write_text(json.dumps(form.companion_json(config), indent=2) + "\n")


def with_companion(folder: Path, form: Format, config: Config) -> Config:
    """The configuration of a folder's network, with what the file beside its weights adds to it.

    Raises:
      ValueError: one of the two files is there without the other, or the JSON is damaged.
    """
    if form.companion is None:
        return config
    about, weights = (folder / f"{form.companion}{suffix}" for suffix in (".json", ".safetensors"))
    if about.is_file() != weights.is_file():
        there, missing = (about, weights) if about.is_file() else (weights, about)
        raise ValueError(f"{there} is there without {missing.name}. Get both, or remove it.")
    if not about.is_file():
        return config
    try:
        return form.with_companion(config, json.loads(about.read_text()))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{about} does not describe the tensors beside it: {error}") from error


def read_companion(folder: Path, form: Format, config: Config, rest: Mapping[str, Any], place: Any) -> dict[str, Any]:
    """The parameters that a library's weights leave out.

    Raises:
      WeightError: tensors that do not fit.
    """
    table = form.companion_map(config)
    if table is None or not flatten(rest):
        return dict(rest)
    return table.from_torch(SafetensorsFile(folder / f"{form.companion}.safetensors"), rest, place)
