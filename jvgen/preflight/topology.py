"""Devices of a TPU pod that this machine does not have, described by libtpu, as targets of compilation."""

import dataclasses
import os

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from jvgen.config import ConfigError
from jvgen.parallel import libtpu
from jvgen.parallel.chips import Chip
from jvgen.parallel.mesh import MeshConfig, across_slices, make_mesh
from jvgen.parallel.pods import Pod, pod_named

# Without this libtpu shows the two cores of a v4 chip as two devices, where TPU VMs show one.
_CHIP_CONFIGS = {"v4": "megacore"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A described pod.

    Attributes:
      pod: kind of chip, shape and slices.
      devices: JAX devices, compile-only: they hold no arrays.
    """

    pod: Pod
    devices: tuple[jax.Device, ...]

    @property
    def name(self) -> str:
        """Such as "v5p:4x4x8"."""
        return self.pod.name

    @property
    def chip(self) -> Chip:
        """Kind of chip."""
        return self.pod.chip

    @property
    def hbm_bytes(self) -> float:
        """Usable memory per device in bytes."""
        return self.chip.device_hbm_bytes

    @property
    def peak_flops(self) -> float:
        """bfloat16 peak per device in FLOP/s."""
        return self.chip.device_peak_flops


def has_compiler() -> bool:
    """Whether libtpu, which holds the TPU compiler, is installed."""
    return libtpu.is_installed()


def describe_for(config: MeshConfig, name: str, slices: int = 1) -> tuple[Topology, Mesh]:
    """A described pod, and its devices arranged into a configured mesh.

    Raises:
      ConfigError: as `describe`; or the mesh does not fit the number of devices or of slices, found before libtpu is
        asked.
    """
    pod = pod_named(name, slices)
    try:
        shape = tuple(config.resolve(pod.devices).values())
        across_slices(shape, slices)
        topology = describe(name, slices)
        return topology, make_mesh(config, topology.devices)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"topology {pod.name}: {error}") from error


def describe(name: str, slices: int = 1) -> Topology:
    """Devices of the topology `GENERATION:AxB` or `GENERATION:AxBxC`, of one or several such slices.

    Raises:
      ConfigError: there is no such topology, or libtpu is missing.
    """
    # First: libtpu ends the whole process for some shapes that do not exist.
    pod = pod_named(name, slices)
    if not has_compiler():
        raise ConfigError(
            "describing a TPU pod needs the TPU compiler of the package libtpu, which is not installed: "
            "pip install 'jvgen[tpu]'. No TPU is needed."
        )
    for variable, value in libtpu.WITHOUT_TPU.items():
        os.environ.setdefault(variable, value)
    options = {"num_slices": slices} if slices > 1 else {}
    if pod.chip.name in _CHIP_CONFIGS:
        options["chip_config_name"] = _CHIP_CONFIGS[pod.chip.name]
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=pod.topology, **options).devices
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"topology {name!r}: this version of libtpu does not describe it ({reason}).") from error
    return Topology(pod, tuple(devices))
