"""From a config and a topology to the numbers of a launch file: processes, mesh, exit codes, seconds of grace."""

import dataclasses
import math
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from jax.sharding import AbstractMesh

from jvgen import exit_codes
from jvgen.config import ConfigError, leaves
from jvgen.launch.flags import Flag, flags_of
from jvgen.launch.machines import Topology, topology
from jvgen.parallel import clusters
from jvgen.parallel.mesh import MESH_AXES, across_slices, slow_axis_warning
from jvgen.parallel.rules import Sharding
from jvgen.training.experiment import Experiment
from jvgen.training.program import Program, check_batch
from jvgen.training.state import size_of

# A pod's name is NAME-slice-I-J-xxxxx and has to fit a DNS label of 63 characters.
MAX_NAME = 28
# What one VM or node writes of a checkpoint, assumed for the seconds of grace.
ASSUMED_BYTES_PER_SECOND = 100e6
# One step, and the time to notice the signal.
ASSUMED_STEP_SECONDS = 90
BUCKETS = ("gs://", "s3://")
# Set by every launch file; by what an option says, if one does.
OWN_VARIABLES = {exit_codes.RESTART_CODE_VARIABLE: "--restart-code"} | dict.fromkeys(
    (clusters.COORDINATOR, clusters.PROCESSES, clusters.PROCESS_ID), ""
)
# Fields of a config that name files to read, as strings.
FILES = r"data\.(evaluation_)?sources\.\d+\.path|task\..*(weights|tokenizer|embeddings|pretrained)|init_from\.run"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What `jvgen launch` was asked for beside the config; a value that a target has no use for is None or empty.

    Attributes:
      topology: `CHIP:SHAPE`.
      workdir: run directory: a bucket, or a path that every process sees.
      slices: TPU slices.
      name: of the job; made of the config's name if none.
      image: container image.
      restart_code: exit status on which the run is started again; the target's own if none.
      max_restarts: how often, evictions not counted where the target can tell.
      grace_seconds: between SIGTERM and SIGKILL; estimated if none.
      queue, priority, namespace, service_account: of Kubernetes (Kueue).
      host_network: pods use the node's network: faster between slices, but no Workload Identity.
      spot, reservation: capacity that is cheaper, or already paid.
      zone, project: of Google Cloud.
      partition, account, time: of Slurm.
      environment: `NAME=VALUE`, added to every process; flags of XLA or libtpu come after the preset's.
      flags: "preset" or "none", for XLA and libtpu.
    """

    topology: str
    workdir: str
    slices: int = 1
    name: str | None = None
    image: str | None = None
    restart_code: int | None = None
    max_restarts: int = 50
    grace_seconds: int | None = None
    queue: str | None = None
    priority: str | None = None
    namespace: str | None = None
    service_account: str | None = None
    host_network: bool = False
    spot: bool = False
    reservation: str | None = None
    zone: str | None = None
    project: str | None = None
    partition: str | None = None
    account: str | None = None
    time: str | None = None
    environment: tuple[str, ...] = ()
    flags: str = "preset"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The numbers of one launch file.

    Attributes:
      config: of `jvgen train`, as it was given.
      assignments: its `--set`.
      workdir: run directory.
      name: of the job.
      topology: devices of the run.
      processes: JAX processes.
      mesh: mesh axis -> size; their product is the number of devices.
      restart_code: exit status that asks for a restart.
      no_restart: exit statuses, other than 0, after which a restart does not help.
      grace_seconds: between SIGTERM and SIGKILL.
      environment: of every process, without the variable of `flags`.
      flags: of XLA or libtpu, with their reasons.
      own_flags: what `--env` adds to them.
    """

    config: str
    assignments: tuple[str, ...]
    workdir: str
    name: str
    topology: Topology
    processes: int
    mesh: dict[str, int]
    restart_code: int
    no_restart: tuple[int, ...]
    grace_seconds: int
    environment: dict[str, str]
    flags: tuple[Flag, ...]
    own_flags: str = ""

    @property
    def flags_text(self) -> str:
        """Value of `flags_variable`; of a flag that is there twice, XLA and libtpu take the last."""
        return " ".join([*map(str, self.flags), self.own_flags]).strip()

    @property
    def arguments(self) -> list[str]:
        """Arguments of `jvgen` but for those that tell processes apart."""
        settings = [part for assignment in self.assignments for part in ("--set", assignment)]
        return ["train", self.config, *settings, "--workdir", self.workdir]

    @property
    def mesh_text(self) -> str:
        """ "data 1 x fsdp 32 x seq 4 x tensor 1"."""
        return " x ".join(f"{axis} {size}" for axis, size in self.mesh.items())

    @property
    def warning(self) -> str:
        """What is slow about the mesh, see `slow_axis_warning`; or ""."""
        return slow_axis_warning(self.mesh, self.topology.slices)


def make_plan(
    experiment: Experiment,
    config: str,
    assignments: tuple[str, ...],
    options: Options,
    *,
    processes_per_machine: int,
    default_restart_code: int,
    variables: Collection[str] = (),
) -> Plan:
    """Derive all numbers, and check that they fit each other.

    Args:
      experiment: the run, validated.
      config: how CONFIG was written.
      assignments: the `--set` that `experiment` includes.
      options: the rest of the command.
      processes_per_machine: JAX processes of one VM or node.
      default_restart_code: if `options` has none.
      variables: environment variables that the launch file sets, besides `OWN_VARIABLES`.

    Raises:
      ConfigError: names the option, its value and the rule.
    """
    place = topology(options.topology, options.slices)
    mesh = _mesh(experiment, place)
    restart_code = default_restart_code if options.restart_code is None else options.restart_code
    exit_codes.parse_restart_code(str(restart_code), "--restart-code")
    if options.max_restarts < 0:
        raise ConfigError(f"--max-restarts {options.max_restarts}: 0 or more.")
    if options.grace_seconds is not None and options.grace_seconds < 30:
        raise ConfigError(
            f"--grace-seconds {options.grace_seconds}: at least 30: one step and one save have to fit into it."
        )
    for assignment in assignments:
        if "\n" in assignment:
            raise ConfigError(f"--set {assignment!r}: its value has several lines; write it into the config file.")
    environment = dict(_environment(options.environment, variables))
    environment[exit_codes.RESTART_CODE_VARIABLE] = str(restart_code)
    own_flags = environment.pop(flags_variable(place), "")
    return Plan(
        config=config,
        assignments=assignments,
        workdir=options.workdir,
        name=_name(options.name, experiment.name),
        topology=place,
        processes=place.hosts * processes_per_machine,
        mesh=mesh,
        restart_code=restart_code,
        no_restart=tuple(code for code in exit_codes.NO_RESTART if code != exit_codes.DONE),
        grace_seconds=options.grace_seconds or estimated_grace(experiment, place, mesh),
        environment=environment,
        flags=flags_of(place.chip) if options.flags == "preset" else (),
        own_flags=own_flags,
    )


def flags_variable(place: Topology) -> str:
    """Environment variable from which the compiler reads its flags."""
    return "LIBTPU_INIT_ARGS" if place.is_tpu else "XLA_FLAGS"


def is_bucket(workdir: str) -> bool:
    """Whether the run directory is in object storage."""
    return workdir.startswith(BUCKETS)


def estimated_grace(experiment: Experiment, place: Topology, mesh: dict[str, int]) -> int:
    """Seconds for one step and one save, in whole half minutes, by assumed rates; between 2 minutes and 1 hour.

    Takes a checkpoint at 100 MB/s per VM or node and 90 s for the step and what lies around it. A measured save
    (`save_stall` in metrics.jsonl) is better: give it by `--grace-seconds`.
    """
    abstract = Program.build(experiment, _abstract_mesh(mesh)).abstract
    seconds = ASSUMED_STEP_SECONDS + size_of(abstract.saved())[1] / place.hosts / ASSUMED_BYTES_PER_SECOND
    return min(3600, max(120, 30 * math.ceil(seconds / 30)))


def _mesh(experiment: Experiment, place: Topology) -> dict[str, int]:
    """The mesh on all devices, checked against slices and batches."""
    try:
        mesh = experiment.mesh.resolve(place.devices)
        across_slices(tuple(mesh.values()), place.slices)
    except ValueError as error:
        raise ConfigError(f"--topology {place.topology} --slices {place.slices}: {error}") from error
    sharding = Sharding(_abstract_mesh(mesh), experiment.sharding)
    for bucket in experiment.data.buckets:
        check_batch(experiment, bucket, sharding)
    return mesh


def _abstract_mesh(mesh: dict[str, int]) -> AbstractMesh:
    return AbstractMesh(tuple(mesh.values()), MESH_AXES)


def _name(given: str | None, experiment: str) -> str:
    """Name of the job: given, or the config's name in what Kubernetes and Google Cloud take."""
    if given is None:
        made = re.sub(r"[^a-z0-9]+", "-", experiment.lower()).strip("-")[:MAX_NAME].strip("-")
        return made if made[:1].isalpha() else f"run-{made}"[:MAX_NAME].strip("-")
    if len(given) > MAX_NAME or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", given):
        raise ConfigError(
            f"--name {given!r}: at most {MAX_NAME} lower-case letters, digits and hyphens, starting with a letter: "
            "names of pods are made of it."
        )
    return given


def _environment(settings: tuple[str, ...], variables: Collection[str]) -> Iterator[tuple[str, str]]:
    for setting in settings:
        name, separator, value = setting.partition("=")
        if not separator or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError(f"--env {setting!r}: write NAME=VALUE.")
        if "\n" in value:
            raise ConfigError(f"--env {name}: its value has several lines.")
        if name in OWN_VARIABLES or name in variables:
            instead = OWN_VARIABLES.get(name)
            raise ConfigError(
                f"--env {setting!r}: the launch file sets {name} itself; "
                + (f"use {instead}." if instead else "leave it out, or change it in the file.")
            )
        yield name, value


def config_in_image(config: str) -> str:
    """Path of the config inside the image, which starts in the repository.

    Raises:
      ConfigError: the path leads out of it.
    """
    path = Path(config)
    if path.is_absolute() or ".." in path.parts:
        raise ConfigError(
            f"CONFIG {config}: the image starts in a folder with the repository's configs/; give the path relative to "
            "it, for example configs/cogvideox_2b.py."
        )
    return config


def outside_image(experiment: Experiment) -> list[str]:
    """Data and weights that a config names by relative paths, each as "FIELD = 'FOLDER'"; the image holds none."""
    return [
        f"{path} = {value}"
        for path, value in leaves(experiment)
        if re.fullmatch(FILES, path) and re.match("'(?!/|[a-z0-9]+://)", value)
    ]
