"""Which cluster this process belongs to: given by arguments, by environment variables, or detected.

Nothing here touches a device. A single process (a laptop, a test, one VM) is recognized without network access.
"""

import dataclasses
import glob
import importlib.util
import os
import re
from collections.abc import Callable, Mapping

from jvgen.config import ConfigError
from jvgen.parallel import jax_internals

COORDINATOR, PROCESSES, PROCESS_ID = "JVGEN_COORDINATOR", "JVGEN_PROCESSES", "JVGEN_PROCESS_ID"
LOCAL_DEVICES = "JAX_LOCAL_DEVICE_IDS"


@dataclasses.dataclass(frozen=True)
class Cluster:
    """How this process reaches the others.

    Attributes:
      name: what was detected, for the log; also the name by which JAX knows it, if `coordinator` is None.
      coordinator: host:port of the coordination service, which process 0 runs.
      processes: number of processes.
      process_id: of this process, from 0.
      local_device_ids: GPUs of this process; None for all that it sees.
    """

    name: str
    coordinator: str
    processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None = None


def find(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float = 300,
    log: Callable[[str], None] = print,
) -> Cluster | None:
    """The cluster of this process; None for a single process.

    Arguments come before the variables JVGEN_COORDINATOR, JVGEN_PROCESSES and JVGEN_PROCESS_ID, and these before
    detection of Slurm, Open MPI, Cloud TPUs and Kubernetes. `processes = 1` turns detection off.

    Args:
      coordinator: host:port.
      processes: number of processes.
      process_id: of this process.
      timeout: seconds to wait for the coordinator's name to be known.
      log: takes warnings.

    Raises:
      ConfigError: incomplete or impossible numbers, or a job that would use one of several GPUs.
    """
    env = os.environ
    processes = processes if processes is not None else _number(env, PROCESSES)
    process_id = process_id if process_id is not None else _number(env, PROCESS_ID)
    coordinator = coordinator or env.get(COORDINATOR) or None
    if coordinator is None and processes is not None:
        coordinator = env.get("JAX_COORDINATOR_ADDRESS")
    if processes == 1:
        return None
    if (coordinator, processes, process_id) != (None, None, None):
        return _explicit(coordinator, processes, process_id)
    for detect in (_slurm, _open_mpi, _tpu, _kubernetes):
        cluster = detect(env, timeout, log)
        if cluster is not None:
            return cluster if cluster.processes > 1 else None
    if env.get("JAX_COORDINATOR_ADDRESS"):  # without this each of the processes would train alone
        raise ConfigError(
            "JAX_COORDINATOR_ADDRESS is set, but no cluster is detected that says how many processes there are: give "
            f"--processes ({PROCESSES}) and --process-id ({PROCESS_ID}), or unset it for a process of its own."
        )
    return None


def _explicit(coordinator: str | None, processes: int | None, process_id: int | None) -> Cluster:
    given = {
        f"--coordinator ({COORDINATOR})": coordinator,
        f"--processes ({PROCESSES})": processes,
        f"--process-id ({PROCESS_ID})": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise ConfigError(
            f"{' and '.join(missing)} missing: several processes need coordinator, number of processes and process id, "
            "or none of them to have the cluster detected."
        )
    if processes < 1:
        raise ConfigError(f"--processes {processes}: the number of processes is at least 1.")
    if not 0 <= process_id < processes:
        raise ConfigError(
            f"--process-id {process_id}: process ids go from 0 to {processes - 1} (--processes {processes} minus 1)."
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"--coordinator {coordinator!r}: expected HOST:PORT, for example 10.0.0.1:6002; ports end at 65535."
        )
    return Cluster("explicit", coordinator, processes, process_id)


def _slurm(env: Mapping[str, str], timeout: float, log: Callable[[str], None]) -> Cluster | None:
    if "SLURM_JOB_ID" not in env:
        return None
    if "SLURM_STEP_NODELIST" not in env:
        if int(env.get("SLURM_NTASKS", "1")) > 1:
            log("WARNING: a Slurm job of several tasks, but outside srun: this is one process alone. Start it by srun.")
        return None
    if "SLURM_PROCID" not in env or "SLURM_LOCALID" not in env or int(env.get("SLURM_NTASKS", "1")) == 1:
        return None
    local_id = int(env["SLURM_LOCALID"])
    devices = None
    if LOCAL_DEVICES not in env:
        gpus = _gpus(env)
        tasks = int(re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", "1"))[0])
        if gpus > max(1, tasks):
            listed = ",".join(str(number) for number in range(gpus))
            raise ConfigError(
                f"Slurm starts {tasks} task{'s' if tasks > 1 else ''} per node, but a node has {gpus} GPUs and a task "
                f"takes one: use --ntasks-per-node={gpus}, or set {LOCAL_DEVICES}={listed} for one task with all."
            )
        # With --gpus-per-task=1 a task sees one GPU, which is number 0 to it.
        devices = (0,) if gpus == 1 and tasks > 1 else (local_id,)
    coordinator = jax_internals.cluster("SlurmCluster").get_coordinator_address(
        int(timeout), env.get("JAX_COORDINATOR_PORT")
    )
    address = env.get("JAX_COORDINATOR_ADDRESS", coordinator)
    return Cluster(
        "Slurm", address, int(env["SLURM_NTASKS"]), int(env["SLURM_PROCID"]), devices if _gpus(env) else None
    )


def _gpus(env: Mapping[str, str]) -> int:
    """GPUs that this process can see, without asking a driver."""
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() and name.strip() != "-1"])
    if "SLURM_GPUS_ON_NODE" in env:
        return int(env["SLURM_GPUS_ON_NODE"])
    return len(glob.glob("/dev/nvidia[0-9]*"))


def _open_mpi(env: Mapping[str, str], timeout: float, log: Callable[[str], None]) -> Cluster | None:
    if "OMPI_MCA_orte_hnp_uri" not in env or int(env.get("OMPI_COMM_WORLD_SIZE", "1")) == 1:
        return None
    detected = jax_internals.cluster("OmpiCluster")
    address = detected.get_coordinator_address(int(timeout), env.get("JAX_COORDINATOR_PORT"))
    devices = (int(env["OMPI_COMM_WORLD_LOCAL_RANK"]),) if LOCAL_DEVICES not in env and _gpus(env) > 1 else None
    address = env.get("JAX_COORDINATOR_ADDRESS", address)
    return Cluster("Open MPI", address, int(env["OMPI_COMM_WORLD_SIZE"]), int(env["OMPI_COMM_WORLD_RANK"]), devices)


def _tpu(env: Mapping[str, str], timeout: float, log: Callable[[str], None]) -> Cluster | None:
    platforms = env.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms:
        return None
    import jax  # noqa: F401  (finds the TPUs of this VM)

    check_megascale(env)
    for name in ("GKE TPU", "GCE TPU"):
        cluster = jax_internals.cluster("GkeTpuCluster" if name == "GKE TPU" else "GceTpuCluster")
        if cluster.is_env_present():
            processes = cluster.get_process_count()
            if processes == 1:
                return Cluster(name, "", 1, 0)
            address = env.get("JAX_COORDINATOR_ADDRESS") or cluster.get_coordinator_address(
                int(timeout), env.get("JAX_COORDINATOR_PORT")
            )
            return Cluster(name, address, processes, cluster.get_process_id())
    return None


def check_megascale(env: Mapping[str, str]) -> None:
    """Raise `ConfigError` for variables of a multi-slice run that are incomplete: left over from an earlier one."""
    if not env.get("MEGASCALE_COORDINATOR_ADDRESS"):
        return
    slices, number = env.get("MEGASCALE_NUM_SLICES", ""), env.get("MEGASCALE_SLICE_ID", "")
    if not (slices.isdecimal() and number.isdecimal() and int(number) < int(slices)):
        raise ConfigError(
            f"MEGASCALE_COORDINATOR_ADDRESS is set, with MEGASCALE_NUM_SLICES = {slices!r} and MEGASCALE_SLICE_ID = "
            f"{number!r}: left over from another job? Unset all variables MEGASCALE_*, or set all three."
        )


def _kubernetes(env: Mapping[str, str], timeout: float, log: Callable[[str], None]) -> Cluster | None:
    if "KUBERNETES_SERVICE_HOST" not in env or "JOB_COMPLETION_INDEX" not in env:
        return None
    if importlib.util.find_spec("kubernetes") is None:
        log(
            f"WARNING: an indexed Kubernetes job, but neither {COORDINATOR}, {PROCESSES} and {PROCESS_ID} are set nor "
            "is the package kubernetes installed: this is one process alone."
        )
        return None
    cluster = jax_internals.cluster("K8sCluster")
    if not cluster.is_env_present():
        return None
    processes = cluster.get_process_count()
    if processes == 1:
        return Cluster("Kubernetes", "", 1, 0)
    address = cluster.get_coordinator_address(int(timeout), env.get("JAX_COORDINATOR_PORT"))
    return Cluster("Kubernetes", address, processes, cluster.get_process_id())


def _number(env: Mapping[str, str], name: str) -> int | None:
    text = env.get(name)
    if text is None or text == "":
        return None
    if not text.isdecimal():
        raise ConfigError(f"{name} = {text!r}: expected a whole number.")
    return int(text)


def proxy_variables(env: Mapping[str, str], host: str) -> list[str]:
    """Names of proxy variables that would come between this process and the coordinator."""
    excepted = [entry.strip().lstrip(".") for entry in env.get("no_proxy", env.get("NO_PROXY", "")).split(",")]
    if "*" in excepted or any(entry and (host == entry or host.endswith(f".{entry}")) for entry in excepted):
        return []
    return sorted(name for name in env if name.lower() in ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy"))
