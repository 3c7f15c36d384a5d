"""Which file in a folder has the weights: the names that diffusers and transformers write, and which of them they read.

Whole: `STEM.safetensors`; in shards: `STEM.safetensors.index.json`, which names them. Of a variant, such as "fp16":
`STEM.fp16.safetensors` and `STEM.safetensors.index.fp16.json`. STEM is `diffusion_pytorch_model` or `model`.
"""

import re
from collections.abc import Iterator

from jvgen.interop.formats import Format
from jvgen.storage import Path

CONFIG = "config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_DIFFUSERS, _TRANSFORMERS, _TRANSFORMERS_PICKLE = "diffusion_pytorch_model", "model", "pytorch_model"
_INDEX = re.compile(r"\.index(?:\.[\w-]+)?\.json$")
_VARIANT_OF_INDEX = re.compile(r"\.index\.(?P<variant>[\w-]+)\.json$")
# Shards of a variant carry its name and their number, and are read by their index.
_VARIANT_OF_FILE = re.compile(r"\w+\.(?P<variant>\w+)\.(?:safetensors|bin|pt|pth|ckpt)")


def is_index(name: str) -> bool:
    """Whether a file of this name is the index of shards."""
    return _INDEX.search(name) is not None


def weights_file(folder: Path, form: Format, variant: str | None = None) -> Path:
    """The file with the weights of the network in a folder, or the index of its shards.

    Of a folder that has both, diffusers' classes read the shards of the index and transformers' the whole file.

    Raises:
      ValueError: there is none; the message names what is there.
    """
    names = list(_names(form, variant))
    for name in names:
        if (folder / name).is_file():
            return folder / name
    expected = " or ".join(dict.fromkeys(sorted(names[:2], key=len)))
    of_variant = "" if variant is None else f" of the variant {variant!r}"
    raise ValueError(f"{folder} has no weights{of_variant}: expected {expected}. {_present(folder, form, variant)}")


def variant_of(name: str) -> str | None:
    """The variant in the name of a file of weights, whole or an index; None for one without."""
    match = _VARIANT_OF_INDEX.search(name) or _VARIANT_OF_FILE.fullmatch(name)
    return None if match is None else match["variant"]


def variants(folder: Path, form: Format) -> list[str]:
    """The variants of the weights in a folder."""
    names = [file.name for file in folder.iterdir() if file.name.startswith(_stems(form))]
    return sorted({variant for name in names if (variant := variant_of(name)) is not None})


def _present(folder: Path, form: Format, variant: str | None) -> str:
    there = variants(folder, form)
    if there:
        examples = [next(name for name in _names(form, one) if (folder / name).is_file()) for one in there[:1]]
        return (
            f"It has the variant{'s' * (len(there) > 1)} {', '.join(there)}: give --variant {there[0]}, or the file "
            f"{folder / examples[0]}."
        )
    if variant is not None and any((folder / name).is_file() for name in _names(form, None)):
        return "It has weights without variants: leave --variant out."
    found = ", ".join(sorted(child.name for child in folder.iterdir())) or "nothing"
    return f"It has: {found}."


def _stems(form: Format) -> tuple[str, ...]:
    return (form.weights_name, *({_DIFFUSERS, _TRANSFORMERS} - {form.weights_name}), _TRANSFORMERS_PICKLE)


def _names(form: Format, variant: str | None) -> Iterator[str]:
    """Names of files and indices, in the order in which they are looked for."""
    mark = "" if variant is None else f".{variant}"
    for stem in _stems(form):
        for suffix in (".safetensors", *PICKLES):
            whole, index = f"{stem}{mark}{suffix}", f"{stem}{suffix}.index{mark}.json"
            yield from (index, whole) if form.weights_name == _DIFFUSERS else (whole, index)
