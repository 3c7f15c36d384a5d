"""Flags of XLA and libtpu for each chip, with the reason for each.

TPU flags are known by what they do to compiled programs (`tests/launch/test_flags.py`); no step was timed with them on
a TPU. An unknown flag ends a process at its start, so a flag that a new libtpu or jaxlib dropped has to go.
"""

import dataclasses

from jvgen.parallel.chips import Chip


@dataclasses.dataclass(frozen=True)
class Flag:
    """One compiler or runtime flag.

    Attributes:
      name: without dashes.
      value: as written.
      reason: what it does for a training step of this project.
    """

    name: str
    value: str
    reason: str

    def __str__(self) -> str:
        return f"--{self.name}={self.value}"


# Not here: xla_tpu_enable_async_collective_fusion with _fuse_all_gather, which others publish. libtpu 0.0.51 refuses it
# on v5p, v6e and tpu7x ("not supported/recommended on platforms other than TPU v5e ... incorrect results, hang").
_OFFLOAD = (
    Flag(
        "xla_tpu_enable_sparse_core_collective_offload_all_gather", "true",
        "gathers of FSDP parameters and of K and V over seq run on the SparseCores while the TensorCores compute; "
        "without it libtpu 0.0.51 compiles every one of them to wait",
    ),
    Flag(
        "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter", "true",
        "the same for the reduce-scatters of FSDP gradients",
    ),
    Flag(
        "xla_tpu_enable_sparse_core_collective_offload_all_reduce", "true",
        "the same for gradients of replicated parameters",
    ),
)  # fmt: skip
_NVIDIA = (
    Flag(
        "xla_gpu_enable_latency_hiding_scheduler", "true",
        "starts collectives early and waits for them late, so that they run beside kernels that do not need them",
    ),
    Flag(
        "xla_gpu_enable_pipelined_all_gather", "true",
        "in the scan over layers the parameters of the next layer are gathered while this one computes",
    ),
    Flag(
        "xla_gpu_enable_pipelined_reduce_scatter", "true",
        "in the backward scan the gradients of the layer before are scattered while this one computes",
    ),
    Flag(
        "xla_gpu_enable_pipelined_all_reduce", "true",
        "the same for gradients that data parallelism reduces inside the scan",
    ),
    Flag(
        "xla_gpu_enable_highest_priority_async_stream", "true",
        "kernels of collectives get streaming multiprocessors first: they are short, and others wait for them",
    ),
)  # fmt: skip

# No entry: v4 (not looked at), v5e (collectives are fused with compute by default), tpu7x (offloads by default).
PRESETS: dict[str, tuple[Flag, ...]] = {
    "v5p": _OFFLOAD,
    "v6e": _OFFLOAD,
    "A100-80GB": _NVIDIA,
    "H100": _NVIDIA,
    "H200": _NVIDIA,
    "B200": _NVIDIA,
}


def flags_of(chip: Chip) -> tuple[Flag, ...]:
    """The preset of a chip; empty where the compiler's defaults are best."""
    return PRESETS.get(chip.name, _NVIDIA if chip.kind.startswith("NVIDIA") else ())
