"""What `jvgen launch` makes files for: which chips and options a target takes, its template, how it is submitted."""

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from jvgen import exit_codes
from jvgen.config import ConfigError
from jvgen.launch import machines
from jvgen.launch.machines import GPUS, TPUS, Topology
from jvgen.launch.plan import (
    Options,
    Plan,
    config_in_image,
    flags_variable,
    is_bucket,
    make_plan,
    outside_image,
)
from jvgen.storage import check_checkpoint_folder
from jvgen.training.experiment import Experiment
from jvgen.training.program import check_processes

# xpk, Cluster Toolkit and clusters that copied their policy restart only 42 and 127-255.
GKE_RESTART_CODE = 42
# Where restarts are not counted: a lost process, not one that ran out of memory.
ABORTED, TERMINATED = 134, 143
FREE = frozenset({"name", "restart_code", "max_restarts", "environment", "flags"})
KUBERNETES = FREE | {
    "image", "grace_seconds", "queue", "priority", "namespace", "service_account", "host_network", "spot",
    "reservation",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Target:
    """One kind of launch file.

    Attributes:
      name: on the command line.
      summary: one line for the help.
      file: name of the file, in `launch/` and of its template.
      chips: "TPU", "GPU" and "CPU", whichever it takes.
      options: of `Options` that it takes besides topology, workdir and slices.
      required: of these, those that have no default.
      restart_code: the default.
      processes_per_machine: JAX processes on one VM or node.
      submit: command line; `FILE` stands for the path of the file, without it the file is the standard input.
      shared_workdir: whether the run directory must be in a bucket or an absolute path.
      in_image: whether the config is read inside the image.
      variables: environment variables that its file sets besides `plan.OWN_VARIABLES`, or uses as names of its own.
    """

    name: str
    summary: str
    file: str
    chips: tuple[str, ...]
    options: frozenset[str]
    required: tuple[str, ...]
    restart_code: int
    processes_per_machine: Callable[[Topology], int]
    submit: tuple[str, ...]
    shared_workdir: bool = True
    in_image: bool = True
    variables: tuple[str, ...] = ()


TARGETS = {
    target.name: target
    for target in (
        Target(
            "local", "processes on the CPUs of this machine, for trying", "local.sh", ("CPU",), FREE, (),
            exit_codes.DEFAULT_RESTART, lambda place: 1, ("bash", "FILE"), shared_workdir=False, in_image=False,
            variables=("CONFIG", "WORKDIR", "PROCESSES", "DEVICES", "MAX_RESTARTS", "LOGS"),
        ),
        Target(
            "slurm", "a batch script with one task per GPU that requeues itself", "slurm.sbatch", ("GPU", "CPU"),
            FREE | {"grace_seconds", "partition", "account", "time"}, (), exit_codes.DEFAULT_RESTART,
            lambda place: place.shape[1], ("sbatch",), in_image=False,
            variables=("CONFIG", "WORKDIR", "MAX_RESTARTS", "GRACE", "RESTARTS", "VERDICTS"),
        ),
        Target(
            "gke-tpu", "a JobSet on GKE with one Job per TPU slice", "gke_tpu.yaml", ("TPU",), KUBERNETES, ("image",),
            GKE_RESTART_CODE, lambda place: 1, ("kubectl", "create", "-f", "-"),
            variables=("JOBSET", "MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID"),
        ),
        Target(
            "gke-gpu", "a JobSet on GKE with one pod per GPU node", "gke_gpu.yaml", ("GPU",), KUBERNETES, ("image",),
            GKE_RESTART_CODE, lambda place: 1, ("kubectl", "create", "-f", "-"),
            variables=("JOBSET", "LD_LIBRARY_PATH"),
        ),
        Target(
            "tpu-vm", "a script for Cloud TPU VMs by queued resources, without Kubernetes", "tpu_vm.sh", ("TPU",),
            FREE | {"image", "grace_seconds", "service_account", "spot", "reservation", "zone", "project"},
            ("image", "zone", "project"), exit_codes.DEFAULT_RESTART, lambda place: 1, ("bash", "FILE", "up"),
        ),
        Target(
            "skypilot", "a SkyPilot managed job on GPU nodes of any cloud", "skypilot.yaml", ("GPU",),
            FREE - {"max_restarts"} | {"spot"}, (), exit_codes.DEFAULT_RESTART, lambda place: 1,
            ("sky", "jobs", "launch", "--yes", "FILE"), in_image=False, variables=("WORKDIR",),
        ),
    )
}  # fmt: skip


def generate(
    target: Target, experiment: Experiment, config: str, assignments: tuple[str, ...], options: Options, command: str
) -> str:
    """The text of a launch file. What is slow about its mesh, and files that an image does not hold, are printed to
    standard error.

    Args:
      target: one of `TARGETS`.
      experiment: the run, validated, with `assignments` applied.
      config: how CONFIG was written.
      assignments: the `--set`.
      options: the rest of the command.
      command: the command line, for the head of the file.

    Raises:
      ConfigError: an option that the target has no use for or that it lacks, chips that it does not run on, a run
        directory that the processes do not share, or numbers that do not fit each other.
    """
    _check_options(target, options)
    if target.in_image:
        config = config_in_image(config)
    plan = make_plan(
        experiment, config, assignments, options,
        processes_per_machine=1, default_restart_code=target.restart_code, variables=target.variables,
    )  # fmt: skip
    _check_chips(target, plan.topology)
    _check_workdir(target, options.workdir)
    plan = dataclasses.replace(plan, processes=plan.topology.hosts * target.processes_per_machine(plan.topology))
    check_processes(experiment, plan.processes)
    text = _render(target, plan, options, command)
    if plan.warning:
        print(f"WARNING: {plan.warning}", file=sys.stderr)
    for warning in _image_warnings(experiment, config, plan.workdir, target):
        print(f"WARNING: {warning}", file=sys.stderr)
    return text


def _image_warnings(experiment: Experiment, config: str, workdir: str, target: Target) -> Iterator[str]:
    """What the containers of a target would not find in `launch/Dockerfile`'s image, or lose with their files."""
    if not target.in_image:
        return
    if missing := outside_image(experiment):
        yield (
            f"launch/Dockerfile's image holds no data and no weights: {', '.join(missing)}. Name buckets, "
            "--set PATH=gs://BUCKET/...: launch/README.md#data-and-weights."
        )
    if Path(config).parts[0] != "configs" and not is_bucket(config):
        yield (
            f"launch/Dockerfile's image holds the folder configs/ alone: CONFIG {config} has to be in the image too; "
            "move it there, or COPY its folder."
        )
    if target.name.startswith("gke") and not is_bucket(workdir):
        yield (
            f"--workdir {workdir}: the file mounts nothing there, and what a pod writes elsewhere ends with it: add "
            "the volume to the file, or name a bucket (gs://BUCKET/x)."
        )


def submit(target: Target, text: str) -> int:
    """Hand the file to the scheduler; its exit status.

    Raises:
      ConfigError: the scheduler's command is not installed.
    """
    tool = target.submit[0]
    if shutil.which(tool) is None:
        raise ConfigError(
            f"--submit: {tool} is not installed here. Save the output as {target.file} and take it to a machine that "
            f"has it: {shlex.join(target.submit).replace(' -f -', f' -f {target.file}').replace('FILE', target.file)}"
        )
    if "FILE" not in target.submit:
        return subprocess.run(target.submit, input=text, text=True).returncode
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / target.file
        file.write_text(text)
        return subprocess.run([str(file) if part == "FILE" else part for part in target.submit]).returncode


def _check_options(target: Target, options: Options) -> None:
    given = [
        field.name
        for field in dataclasses.fields(options)
        if field.default is not dataclasses.MISSING and getattr(options, field.name) != field.default
    ]
    foreign = [name for name in given if name not in target.options and name != "slices"]
    if foreign:
        users = [other.name for other in TARGETS.values() if foreign[0] in other.options]
        raise ConfigError(f"{flag_name(foreign[0])} is for {' and '.join(users)}; {target.name} has no use for it.")
    if options.spot and options.reservation is not None:
        raise ConfigError(
            f"--spot --reservation {options.reservation}: machines are either spot or reserved; leave one out."
        )
    for name, value in vars(options).items():
        if name != "workdir" and isinstance(value, str) and re.search(r"\s", value):
            raise ConfigError(f"{flag_name(name)} {value!r}: a name has no spaces and no line breaks; leave them out.")
    missing = [name for name in target.required if not getattr(options, name)]
    if missing:
        raise ConfigError(f"{target.name} needs {', '.join(flag_name(name) for name in missing)}.")


def flag_name(option: str) -> str:
    """The flag of a field of `Options`: "--grace-seconds"."""
    return {"environment": "--env", "flags": "--xla-flags"}.get(option, f"--{option.replace('_', '-')}")


def _check_chips(target: Target, place: Topology) -> None:
    kind = "TPU" if place.is_tpu else "GPU" if place.is_gpu else "CPU"
    if kind not in target.chips:
        fitting = [other.name for other in TARGETS.values() if kind in other.chips]
        raise ConfigError(
            f"--topology {place.topology}: {target.name} is for {' and '.join(target.chips)}; for {kind} use "
            f"{' or '.join(fitting)}."
        )
    if place.is_gpu and place.chip.name not in GPUS and target.name != "slurm":
        raise ConfigError(
            f"--topology {place.topology}: {target.name} knows no machine with {place.chip.name}; use "
            f"{', '.join(GPUS)}, or slurm, which takes every GPU."
        )
    if place.is_gpu and place.shape[1] != machines.GPUS_PER_NODE and target.name != "slurm":
        raise ConfigError(
            f"--topology {place.topology}: a node of {target.name} has {machines.GPUS_PER_NODE} GPUs; write "
            f"{place.chip.name.lower()}:NODESx{machines.GPUS_PER_NODE}."
        )


def _check_workdir(target: Target, workdir: str) -> None:
    if "\n" in workdir:
        raise ConfigError(f"--workdir {workdir!r}: has several lines; name one folder.")
    if is_bucket(workdir):
        check_checkpoint_folder(workdir)
        if not workdir.partition("://")[2].partition("/")[0]:
            raise ConfigError(f"--workdir {workdir!r}: names no bucket; write gs://BUCKET/FOLDER.")
    if not target.shared_workdir or is_bucket(workdir) or workdir.startswith("/"):
        return
    raise ConfigError(
        f"--workdir {workdir!r}: machines of {target.name} do not share that folder; name a bucket (gs://BUCKET/x), "
        "or an absolute path that is mounted on all of them."
    )


def _render(target: Target, plan: Plan, options: Options, command: str) -> str:
    loader = PackageLoader("jvgen.launch", "templates")
    templates = Environment(
        loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    templates.filters |= {"sh": shlex.quote, "yaml": _yaml, "k8s": _k8s, "unit": _unit, "lines": _commented}
    place = plan.topology
    return templates.get_template(f"{target.file}.j2").render(
        plan=plan,
        options=options,
        place=place,
        target=target,
        command=command,
        machine=TPUS.get(place.chip.name) or GPUS.get(place.chip.name),
        accelerator_type=machines.accelerator_type(place) if target.name == "tpu-vm" else None,
        flags=plan.flags_text,
        flags_variable=flags_variable(place),
        is_bucket=is_bucket(plan.workdir),
        unlimited_restarts=[plan.restart_code, ABORTED, TERMINATED],
    )


def _yaml(text: object) -> str:
    """A YAML scalar in double quotes."""
    return json.dumps(str(text), ensure_ascii=False)


def _k8s(text: object) -> str:
    """The same for `args` and `env` of a container, where `$(NAME)` would be expanded."""
    return _yaml(str(text).replace("$(", "$$("))


def _unit(text: object) -> str:
    """A word of a systemd unit that stands in an unquoted here-document of a shell script."""
    word = str(text).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    word = f'"{word}"'
    return word.replace("\\", "\\\\").replace("$", "\\$").replace("`", "\\`")


def _commented(flags: tuple, indent: int) -> str:
    """One comment per flag with its reason, wrapped by line of 118 characters."""
    return "".join(f"{' ' * indent}# {flag.name}: {flag.reason}\n" for flag in flags)
