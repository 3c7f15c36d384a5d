"""Parameters that a library's class does not have: in a file of ours beside its weights, described by a JSON file.

The class loads its folder strictly and ignores both files; `import_folder` reads them again.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from jvgen.config import Config
from jvgen.finite import narrowed
from jvgen.interop.formats import Format
from jvgen.interop.safetensors_file import SafetensorsFile, TensorSpec, write
from jvgen.models.weight_map import WeightError
from jvgen.nested import flatten
from jvgen.storage import Path, read_json_object


def write_extra_weights(
    folder: Path, form: Format, config: Config, parameters: Mapping[str, Any], dtype: np.dtype
) -> None:
    """Write the parameters that the library's weights leave out; nothing if there are none.

    Raises:
      NotFinite: see `jvgen.finite.narrowed`.
    """
    table = form.extra_weight_map(config)
    if table is None:
        return
    specs = {name: TensorSpec(shape, dtype) for name, shape in table.torch_shapes(parameters).items()}
    tensors = ((name, narrowed(name, array, dtype)) for name, array in table.to_torch(parameters))
    write(folder / f"{form.extra_weights}.safetensors", specs, tensors)
    (folder / f"{form.extra_weights}.json").write_text(json.dumps(form.extra_weights_json(config), indent=2) + "\n")


def with_extra_weights(folder: Path, form: Format, config: Config) -> Config:
    """The configuration of a folder's network, completed by the description of its extra weights.

    Raises:
      ValueError: one of the two files without the other, or corrupt JSON.
    """
    if form.extra_weights is None:
        return config
    description, weights = (folder / f"{form.extra_weights}{suffix}" for suffix in (".json", ".safetensors"))
    if description.is_file() != weights.is_file():
        present, missing = (description, weights) if description.is_file() else (weights, description)
        raise ValueError(f"{present} exists without {missing.name}. Get both, or remove it.")
    if not description.is_file():
        return config
    values = read_json_object(description)
    try:
        return form.with_extra_weights(config, values)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{description} does not describe the tensors beside it: {error}") from error


def read_extra_weights(
    folder: Path, form: Format, config: Config, shapes: Mapping[str, Any], place: Any
) -> dict[str, Any]:
    """The parameters that a library's weights leave out, in nested `shapes`.

    Raises:
      WeightError: tensors that do not fit.
    """
    table = form.extra_weight_map(config)
    if table is None or not flatten(shapes):
        return dict(shapes)
    file = folder / f"{form.extra_weights}.safetensors"
    if not file.is_file():
        raise WeightError(f"{file}, with what {form.class_name} does not have ({', '.join(shapes)}), is missing.")
    return table.from_torch(SafetensorsFile(file), shapes, place)
