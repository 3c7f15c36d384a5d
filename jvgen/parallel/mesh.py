"""The device mesh: the devices of a run, arranged along the four mesh axes."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Annotated

import jax
import numpy as np
from einops import rearrange
from jax.sharding import AxisType, Mesh

from jvgen.config import Config, ConfigError
from jvgen.parallel import torus
from jvgen.value_rules import Bounds

# Mesh axes, outermost first: neighbors along the last axis are nearest in the network.
DATA = "data"  # data parallelism: full replicas of the parameters, each with its own examples
FSDP = "fsdp"  # examples are split, and so are the stored parameters
SEQ = "seq"  # sequence (context) parallelism: tokens of one example are split
TENSOR = "tensor"  # tensor parallelism: heads and hidden units of one layer are split
MESH_AXES = (DATA, FSDP, SEQ, TENSOR)


AxisSize = Annotated[int, Bounds(at_least=-1, at_most=2**20, fix="-1 for all remaining devices")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Config):
    """Number of devices along each mesh axis; one axis may be -1, which takes the remaining devices.

    Attributes:
      data: replicas; on several slices or nodes this axis is the first to cross the slow network.
      fsdp: shards of parameters, optimizer state and examples.
      seq: shards of the token sequence of one example.
      tensor: shards of attention heads and feed-forward units.
    """

    data: AxisSize = 1
    fsdp: AxisSize = -1
    seq: AxisSize = 1
    tensor: AxisSize = 1

    def validate(self) -> None:
        sizes = self.sizes
        for name, size in sizes.items():
            if size == 0:
                raise ValueError(
                    f"{name} = {size}: a mesh axis has at least 1 device, or -1 for all remaining devices."
                )
        free = [name for name, size in sizes.items() if size == -1]
        if len(free) > 1:
            raise ValueError(
                f"{' and '.join(free)} are both -1: only one axis can take the remaining devices; set the others."
            )

    @property
    def sizes(self) -> dict[str, int]:
        """Axis name -> configured size in mesh order; -1 is not resolved."""
        return {name: getattr(self, name) for name in MESH_AXES}

    def resolve(self, devices: int) -> dict[str, int]:
        """Axis name -> size on this many devices.

        Raises:
          ValueError: the product of the sizes is not the number of devices, or does not divide it.
        """
        self.validate()
        sizes = self.sizes
        fixed = math.prod(size for size in sizes.values() if size != -1)
        written = ", ".join(f"{name}={size}" for name, size in sizes.items())
        if -1 in sizes.values():
            if devices % fixed:
                raise ValueError(
                    f"mesh {written}: the fixed axes need a multiple of {fixed} devices, but there are {devices}; "
                    f"choose sizes whose product divides {devices}."
                )
            return {name: devices // fixed if size == -1 else size for name, size in sizes.items()}
        if fixed != devices:
            raise ValueError(
                f"mesh {written}: needs {fixed} devices, but there are {devices}; change a size, or set one axis to -1."
            )
        return sizes


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arrange devices (default: all of `jax.devices()`) into a mesh with the axes data, fsdp, seq, tensor.

    On TPU the arrangement follows the physical torus, with `seq` along rings of neighbors where there are such
    (`torus.arrange`); on several slices the data axis (or, where it is too short, fsdp) crosses between them.

    Raises:
      ValueError: the product of the sizes does not fit the devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = tuple(config.resolve(len(devices)).values())
    return Mesh(_arrange(shape, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _arrange(shape: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(shape)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    across = across_slices(shape, slices)
    within = tuple(size // outer for size, outer in zip(shape, across, strict=True))
    by_slice: dict[int, list[jax.Device]] = defaultdict(list)
    for device in devices:
        by_slice[getattr(device, "slice_index", 0)].append(device)
    arranged = np.stack([torus.arrange(within, by_slice[number]) for number in sorted(by_slice)])
    whole = arranged.reshape(*across, *within)
    return rearrange(whole, "d0 f0 s0 t0 d f s t -> (d0 d) (f0 f) (s0 s) (t0 t)")


def across_slices(shape: tuple[int, ...], slices: int) -> tuple[int, ...]:
    """The part of each mesh axis that crosses between slices: of data first, then of fsdp.

    Raises:
      ValueError: data x fsdp is not a multiple of the slices.
    """
    across = [1] * len(shape)
    for axis in range(2):
        across[axis] = math.gcd(shape[axis], slices // math.prod(across))
    if math.prod(across) != slices:
        raise ValueError(
            f"mesh data={shape[0]}, fsdp={shape[1]} on {slices} slices: seq and tensor stay inside a slice, "
            f"so data x fsdp must be a multiple of {slices}."
        )
    return tuple(across)


def single_device_mesh(device: jax.Device | None = None) -> Mesh:
    """A mesh of one device, for code that requires a mesh."""
    return make_mesh(MeshConfig(fsdp=1), [jax.devices()[0] if device is None else device])


def host_device() -> jax.Device:
    """A CPU device of this process: arrays on it are in host memory, whatever accelerators there are.

    Raises:
      ConfigError: JAX was told to use accelerators only.
    """
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise ConfigError(
            f"JAX_PLATFORMS = {jax.config.jax_platforms!r} leaves out the CPU, in whose memory weights are converted; "
            "unset it, or append ',cpu'."
        ) from error


def slow_axis_warning(sizes: Mapping[str, int], slices: int) -> str:
    """What to change if `fsdp` crosses between slices, over whose network each layer's parameters then pass; or ""."""
    crossing = across_slices(tuple(sizes.values()), slices)[MESH_AXES.index(FSDP)]
    if crossing == 1:
        return ""
    return (
        f"fsdp crosses {crossing} slices, over whose network the parameters of every layer then pass: set mesh.data to "
        f"a multiple of {slices}, so that only gradients do"
    )


def describe(mesh: Mesh) -> str:
    """One line for the start-up log: axis sizes, device count and kind, and `slow_axis_warning`."""
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    kind = mesh.devices.flat[0].device_kind
    slices = len({getattr(device, "slice_index", 0) for device in mesh.devices.flat})
    warning = slow_axis_warning(mesh.shape, slices) if slices > 1 else ""
    return f"mesh {sizes} = {mesh.size} devices ({kind})" + (f"; WARNING: {warning}" if warning else "")
