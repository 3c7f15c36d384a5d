"""What clouds call machines: accelerator labels, topologies, machine types and runtime versions by chip."""

import dataclasses
import math

from jvgen.config import ConfigError
from jvgen.parallel.chips import CHIPS, Chip, chip_named
from jvgen.parallel.pods import SLICES, SMALL_TORUS, Pod, check_shape

CPU = Chip("cpu", "cpu", 0.0, 0.0)


@dataclasses.dataclass(frozen=True)
class TpuMachine:
    """One TPU generation.

    Attributes:
      accelerator: value of the node label `cloud.google.com/gke-tpu-accelerator`.
      machine_type: of Compute Engine, with four chips.
      runtime_version: of Cloud TPU VMs.
    """

    accelerator: str
    machine_type: str
    runtime_version: str | None


TPUS = {
    "v4": TpuMachine("tpu-v4-podslice", "ct4p-hightpu-4t", "tpu-ubuntu2204-base"),
    "v5e": TpuMachine("tpu-v5-lite-podslice", "ct5lp-hightpu-4t", "v2-alpha-tpuv5-lite"),
    "v5p": TpuMachine("tpu-v5p-slice", "ct5p-hightpu-4t", "v2-alpha-tpuv5"),
    "v6e": TpuMachine("tpu-v6e-slice", "ct6e-standard-4t", "v2-alpha-tpuv6e"),
    "tpu7x": TpuMachine("tpu7x", "tpu7x-standard-4t", None),
}


@dataclasses.dataclass(frozen=True)
class GpuMachine:
    """One GPU node of Google Cloud.

    Attributes:
      accelerator: value of the node label `cloud.google.com/gke-accelerator`.
      machine_type: of Compute Engine.
      rdma: whether NCCL reaches other nodes by RDMA over networks that the pod names; else by TCP.
      sky: what SkyPilot calls the GPU.
    """

    accelerator: str
    machine_type: str
    rdma: bool
    sky: str


GPUS_PER_NODE = 8
GPUS = {
    "A100-80GB": GpuMachine("nvidia-a100-80gb", "a2-ultragpu-8g", False, "A100-80GB"),
    "H100": GpuMachine("nvidia-h100-80gb", "a3-highgpu-8g", False, "H100"),
    "H200": GpuMachine("nvidia-h200-141gb", "a3-ultragpu-8g", True, "H200"),
    "B200": GpuMachine("nvidia-b200", "a4-highgpu-8g", True, "B200"),
}


@dataclasses.dataclass(frozen=True)
class Topology(Pod):
    """Devices of a run, read from `--topology` and `--slices`: TPU slices, or nodes of GPUs or CPUs.

    Attributes:
      chip: kind of chip; `CPU` for processes of one machine.
      shape: of a TPU slice, or (nodes, devices per node).
      slices: number of TPU slices; 1 for GPUs and CPUs.
    """

    @property
    def is_tpu(self) -> bool:
        """Whether the chip is a TPU."""
        return self.chip.name in TPUS

    @property
    def is_gpu(self) -> bool:
        """Whether the chip is a GPU."""
        return self.chip in CHIPS and not self.is_tpu

    @property
    def hosts_per_slice(self) -> int:
        """VMs of one TPU slice, or nodes."""
        return super().hosts_per_slice if self.is_tpu else self.shape[0]


def topology(text: str, slices: int = 1) -> Topology:
    """Read `CHIP:SHAPE`: a slice of TPUs ("v5p:4x4x8"), NODESxDEVICES of GPUs ("h100:4x8") or of CPUs ("cpu:2x4").

    Raises:
      ConfigError: unknown chip, a shape that the chip does not come in, or slices of something that has none.
    """
    kind, separator, shape_text = text.partition(":")
    sizes = shape_text.split("x")
    if not separator or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise ConfigError(
            f"--topology {text!r}: write CHIP:SHAPE, for example v5p:4x4x8 or v6e:16x16 for a TPU slice, h100:4x8 for "
            "4 nodes of 8 GPUs, cpu:2x4 for 2 processes of 4 devices on this machine."
        )
    shape = tuple(int(size) for size in sizes)
    if kind.lower() == "cpu":
        chip = CPU
    else:
        try:
            chip = chip_named(kind)
        except ValueError as error:
            raise ConfigError(f"--topology {text!r}: {error}") from error
    if slices < 1:
        raise ConfigError(f"--slices {slices}: at least 1.")
    found = Topology(chip, shape, slices)
    if found.is_tpu:
        check_shape(chip, shape, f"--topology {found.topology!r}")
        return found
    if slices != 1:
        raise ConfigError(f"--slices {slices}: only TPUs come in slices; write more nodes in --topology {text}.")
    if len(shape) != 2:
        raise ConfigError(f"--topology {text!r}: for {chip.name} write {kind}:NODESxDEVICES, for example {kind}:4x8.")
    return found


def accelerator_type(found: Topology) -> str:
    """What Cloud TPU VMs call one slice: "v5p-256" for v5p:4x4x8.

    Raises:
      ConfigError: there are no such VMs, or the name stands for another shape with as many chips.
    """
    name = SLICES[found.chip.name].name_of(math.prod(found.shape))
    if name is None:
        raise ConfigError(f"--topology {found.topology!r}: {found.chip.name} is offered on GKE only; use gke-tpu.")
    chips = math.prod(found.shape)
    usual = _most_compact(chips) if not SLICES[found.chip.name].is_plane else found.shape
    if found.shape != usual:
        raise ConfigError(
            f"--topology {found.topology!r}: tpu-vm orders a number of chips and gets "
            f"{'x'.join(map(str, usual))} for {chips}; write that, or use gke-tpu."
        )
    return name


def _most_compact(chips: int) -> tuple[int, ...]:
    """The torus of this many chips with the shortest longest side, and of several such the most nearly cubic one."""
    small = [tuple(map(int, text.split("x"))) for text in SMALL_TORUS]
    shapes = [shape for shape in small if math.prod(shape) == chips]
    sides = range(4, chips // 16 + 1, 4)
    shapes += [
        (a, b, chips // a // b)
        for a in sides
        for b in sides
        if a <= b <= chips / a / b and chips % (a * b) == 0 and chips // a // b % 4 == 0
    ]
    return min(shapes, key=lambda shape: (max(shape), sum(shape)))
