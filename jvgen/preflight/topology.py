"""Devices of a TPU pod that this machine does not have, described by libtpu, as targets of compilation."""

import dataclasses
import importlib.util
import math
import os

import jax
from jax.experimental import topologies

from jvgen.config import ConfigError
from jvgen.parallel.chips import Chip, chip_named

# Tested names; others of the same form work too.
KNOWN = (
    "v4:4x4x4", "v5e:2x2", "v5e:4x4", "v5e:16x16", "v5p:2x2x1", "v5p:4x4x4", "v5p:4x4x8", "v5p:8x8x8", "v6e:2x2",
    "v6e:16x16", "tpu7x:2x2x1", "tpu7x:4x4x4",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topology:
    """A described pod.

    Attributes:
      name: such as "v5p:4x4x8".
      chip: kind of chip.
      chips: number of chips.
      devices: JAX devices, compile-only: they hold no arrays.
    """

    name: str
    chip: Chip
    chips: int
    devices: tuple[jax.Device, ...]

    @property
    def hbm_bytes(self) -> float:
        """Usable memory per device in bytes."""
        return self.chip.hbm_bytes * self.chips / len(self.devices)

    @property
    def peak_flops(self) -> float:
        """bfloat16 peak per device in FLOP/s."""
        return self.chip.peak_flops * self.chips / len(self.devices)


def has_compiler() -> bool:
    """Whether libtpu, which holds the TPU compiler, is installed."""
    return importlib.util.find_spec("libtpu") is not None


def describe(name: str) -> Topology:
    """Devices of the topology `CHIP:AxB` or `CHIP:AxBxC`.

    Raises:
      ConfigError: libtpu is missing, or it does not know the topology.
    """
    if not has_compiler():
        raise ConfigError(
            "compiling ahead of time needs the TPU compiler of the package libtpu, which is not installed: "
            "pip install 'jvgen[tpu]'. No TPU is needed."
        )
    # Without these libtpu would look for TPUs and for other users of them.
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    }.items():
        os.environ.setdefault(variable, value)
    kind, _, shape = name.partition(":")
    try:
        chip = chip_named(kind)
        chips = math.prod(int(part) for part in shape.split("x"))
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"topology {name!r} is unknown to the TPU compiler ({reason}). Write CHIP:SHAPE, for example "
            f"{', '.join(KNOWN)}."
        ) from error
    return Topology(name, chip, chips, tuple(devices))
