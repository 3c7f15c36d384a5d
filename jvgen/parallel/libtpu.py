"""The package libtpu on machines without a TPU, where it is there for its compiler: no search for TPUs, no messages."""

import contextlib
import glob
import importlib.util
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, MutableMapping
from pathlib import Path

# For a process that compiles only. Without these libtpu looks for TPUs and for other users of them, and prints on
# stderr what it did not find, in every process that starts a JAX backend.
WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}
_GOOGLE = "0x1ae0"
# Virtual network card and disk of Google's cloud.
_OTHER_DEVICES = {"0x0042", "0x001f"}


def is_installed() -> bool:
    """Whether the package libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def tpu_may_be_attached(root: str = "/") -> bool:
    """Whether this machine has a device file or a PCI device that may be a TPU's. If in doubt, true.

    Args:
      root: folder in which `dev` and `sys` are.
    """
    if glob.glob(f"{root}/dev/accel*") or glob.glob(f"{root}/dev/vfio/[0-9]*"):
        return True
    for vendor in glob.glob(f"{root}/sys/bus/pci/devices/*/vendor"):
        try:
            device = Path(vendor).with_name("device").read_text().strip()
            if Path(vendor).read_text().strip() == _GOOGLE and device not in _OTHER_DEVICES:
                return True
        except OSError:
            return True
    return False


def silence_without_tpu(environment: MutableMapping[str, str], root: str = "/") -> None:
    """Set `WITHOUT_TPU` in `environment` if libtpu is installed and no TPU can be here. Before the first JAX backend.

    Nothing is set where the environment says something about TPUs itself, or where JAX was told to leave TPUs out.
    """
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms.split(","):
        return
    if "JAX_FORCE_TPU_INIT" in environment or any(name.startswith("TPU_") for name in environment):
        return
    if is_installed() and not tpu_may_be_attached(root):
        for name, value in WITHOUT_TPU.items():
            environment.setdefault(name, value)


# What libtpu reads once, when it is loaded.
_ARGUMENTS = "LIBTPU_INIT_ARGS"
# The final bundles of every kernel, and how they use the units of the cores.
_PASSES = "(final_bundles|final_hlo-static-per-bundle-utilization)"


@contextlib.contextmanager
def writing_bundles(more: Iterable[str] = ()) -> Iterator[None]:
    """Let libtpu write the instructions of what it compiles, which `bundles_folder` then names, until the end.

    Only in a process that has not loaded libtpu yet: there is no way to tell it later.

    Args:
      more: other flags to compile with, such as "--xla_tpu_spmd_rng_bit_generator_unsafe=true".
    """
    before = os.environ.get(_ARGUMENTS)
    with tempfile.TemporaryDirectory(prefix="jvgen_bundles_") as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex={_PASSES}"
        os.environ[_ARGUMENTS] = " ".join([before or "", *more, flags]).strip()
        try:
            yield
        finally:
            if before is None:
                del os.environ[_ARGUMENTS]
            else:
                os.environ[_ARGUMENTS] = before


def bundles_folder() -> str | None:
    """Where libtpu writes the instructions of what it compiles; None if it was not told to."""
    folders = re.findall(r"--xla_jf_dump_to=(\S+)", os.environ.get(_ARGUMENTS, ""))
    return folders[-1] if folders else None
