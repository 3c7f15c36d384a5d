"""Memory, peak FLOP/s and rates of accelerator chips: denominators of memory reports and of model FLOPs utilization.

Peaks are the vendors' dense bfloat16 figures, that of 8-bit integers beside it where it is higher. HBM of TPUs is
what XLA's compiler lets a program use (it says so when a program does not fit), a little under the nominal size; HBM
of GPUs is nominal. Clocks follow from peak and matrix units: 128 x 128 up to v5p, 256 x 256 on v6e, 4 per TensorCore
(2 on v6e's). Rates of links are what rings reach by "How to Scale Your Model" (jax-ml.github.io/scaling-book), a
tenth under the data sheets.
"""

import dataclasses

import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
      name: as clouds and vendors call it.
      kind: start of JAX's `device_kind`.
      hbm_bytes: usable memory of the chip.
      peak_flops: dense bfloat16 FLOP/s of the chip.
      devices: JAX devices that a chip shows by default.
      bandwidth: between the chip and its memory, bytes/s by the data sheet.
      clock: of its TensorCores in Hz; 0 if not known.
      cores: TensorCores of one JAX device.
      link: bytes/s of one link to a neighbor, one way; 0 where there are none.
      int8: rate of products of 8-bit integers over that of bfloat16, by the data sheet; 1 where it is not known.
    """

    name: str
    kind: str
    hbm_bytes: float
    peak_flops: float
    devices: int = 1
    bandwidth: float = 0.0
    clock: float = 0.0
    cores: int = 1
    link: float = 0.0
    int8: float = 1.0

    @property
    def device_bandwidth(self) -> float:
        """Bytes/s between one JAX device and its memory."""
        return self.bandwidth / self.devices

    @property
    def device_hbm_bytes(self) -> float:
        """Usable memory of one JAX device."""
        return self.hbm_bytes / self.devices

    @property
    def device_peak_flops(self) -> float:
        """Dense bfloat16 FLOP/s of one JAX device."""
        return self.peak_flops / self.devices


CHIPS = (
    Chip("v4", "TPU v4", 30.5 * GIB, 275e12, bandwidth=1228e9, clock=1.05e9, cores=2, link=45e9),
    Chip("v5e", "TPU v5 lite", 15.75 * GIB, 197e12, bandwidth=819e9, clock=1.5e9, link=45e9, int8=2.0),
    Chip("v5p", "TPU v5", 95.73 * GIB, 459e12, bandwidth=2765e9, clock=1.75e9, cores=2, link=90e9, int8=2.0),
    Chip("v6e", "TPU v6 lite", 31.24 * GIB, 918e12, bandwidth=1640e9, clock=1.75e9, link=90e9, int8=2.0),
    Chip("tpu7x", "TPU7x", 2 * 94.74 * GIB, 2307e12, devices=2, bandwidth=7380e9, link=90e9),
    Chip("A100-80GB", "NVIDIA A100", 80e9, 312e12, bandwidth=2039e9),
    Chip("A100-40GB", "NVIDIA A100-SXM4-40GB", 40e9, 312e12, bandwidth=1555e9),
    Chip("A100-40GB-PCIe", "NVIDIA A100-PCIE-40GB", 40e9, 312e12, bandwidth=1555e9),
    Chip("H100", "NVIDIA H100", 80e9, 989e12, bandwidth=3350e9),
    Chip("H100-PCIe", "NVIDIA H100 PCIe", 80e9, 756e12, bandwidth=2000e9),
    Chip("H100-NVL", "NVIDIA H100 NVL", 94e9, 835e12, bandwidth=3900e9),
    Chip("H200", "NVIDIA H200", 141e9, 989e12, bandwidth=4800e9),
    Chip("H200-NVL", "NVIDIA H200 NVL", 141e9, 835e12, bandwidth=4800e9),
    Chip("B200", "NVIDIA B200", 180e9, 2250e12, bandwidth=8000e9),
)


def chip_of(device: jax.Device | str) -> Chip | None:
    """The chip that a JAX device (or its `device_kind`) belongs to; None where it is not in the table."""
    kind = device if isinstance(device, str) else device.device_kind
    kind = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite"}.get(kind, kind)
    # Longest first: a "TPU v5 lite" is not a "TPU v5".
    for chip in sorted(CHIPS, key=lambda chip: -len(chip.kind)):
        if kind.startswith(chip.kind):
            return chip
    return None


def chip_named(name: str) -> Chip:
    """The chip of a topology name ("v5p" of "v5p:4x4x8").

    Raises:
      ValueError: no such chip; lists those that there are.
    """
    for chip in CHIPS:
        if chip.name.lower() == name.lower():
            return chip
    raise ValueError(f"chip {name!r} is not known; the table has {', '.join(chip.name for chip in CHIPS)}.")
