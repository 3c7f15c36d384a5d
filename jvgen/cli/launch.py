"""`jvgen launch`: print or submit the launch file of a run on many machines."""

import argparse
import shlex
import sys

from jvgen.cli.arguments import add_command, add_config_arguments, experiment_of, number
from jvgen.value_rules import Count, CountOrZero

TARGETS = ("local", "slurm", "gke-tpu", "gke-gpu", "tpu-vm", "skypilot")


def add_commands(commands) -> None:
    """Add `launch`."""
    parser = add_command(
        commands, "launch", "print or submit the launch file of a run on many machines",
        "jvgen launch gke-tpu configs/cogvideox_2b.py --topology v5p:4x4x8 --slices 2 --set mesh.data=2 "
        "--image IMAGE --workdir gs://BUCKET/runs/x",
        "jvgen launch slurm configs/cogvideox_2b.py --topology h100:16x8 --workdir /shared/runs/x --submit",
        details="Processes, labels, mesh and exit codes are derived from the config and the topology. launch/README.md "
        "says which target to take.",
        handler=run_launch,
    )  # fmt: skip
    parser.add_argument("target", choices=TARGETS, metavar="TARGET", help=", ".join(TARGETS))
    add_config_arguments(parser)
    parser.add_argument(
        "--topology", required=True, metavar="CHIP:SHAPE",
        help="one TPU slice (v5p:4x4x8), or NODESxDEVICES: h100:16x8, cpu:2x4",
    )  # fmt: skip
    parser.add_argument(
        "--workdir", required=True, metavar="DIR",
        help="run directory: gs://BUCKET/..., or a path that all machines mount",
    )  # fmt: skip
    parser.add_argument("--submit", action="store_true", help="start it by sbatch, kubectl, gcloud, sky or bash")

    run = parser.add_argument_group("the run")
    run.add_argument("--slices", type=number(Count), default=1, metavar="N", help="TPU slices of this topology")
    run.add_argument("--name", metavar="NAME", help="of the job, at most 28 characters; made of the config's name")
    run.add_argument("--image", help="container image, made by launch/Dockerfile (gke-tpu, gke-gpu, tpu-vm)")
    run.add_argument(
        "--env", dest="environment", action="append", default=[], metavar="NAME=VALUE",
        help="environment variable of every process (repeatable)",
    )  # fmt: skip
    run.add_argument(
        "--xla-flags", dest="flags", choices=["preset", "none"], default="preset",
        help="LIBTPU_INIT_ARGS or XLA_FLAGS: the chip's flags of jvgen/launch/flags.py, or none",
    )  # fmt: skip

    stopping = parser.add_argument_group("stopping and restarting")
    stopping.add_argument(
        "--restart-code", type=number(Count), metavar="CODE",
        help="exit code that asks for a restart: 42 on GKE, 75 elsewhere if omitted",
    )  # fmt: skip
    stopping.add_argument(
        "--max-restarts",
        type=number(CountOrZero),
        default=50,
        metavar="N",
        help="restarts (not skypilot); evictions of GKE are not counted",
    )
    stopping.add_argument(
        "--grace-seconds", type=number(CountOrZero), metavar="SECONDS",
        help="seconds between SIGTERM and SIGKILL, enough for one step and one save; estimated from the size of a "
        "checkpoint if omitted",
    )  # fmt: skip

    kubernetes = parser.add_argument_group("GKE")
    kubernetes.add_argument("--namespace", metavar="NAME", help="namespace of the JobSet")
    kubernetes.add_argument("--queue", metavar="NAME", help="LocalQueue of Kueue")
    kubernetes.add_argument("--priority", metavar="CLASS", help="priority class: Kueue's with --queue, else the pods'")
    kubernetes.add_argument(
        "--host-network", action="store_true",
        help="pods use the node's network: faster between slices, but no Workload Identity",
    )  # fmt: skip
    kubernetes.add_argument("--service-account", metavar="NAME", help="whose rights the processes have (also tpu-vm)")

    capacity = parser.add_argument_group("capacity")
    capacity.add_argument("--spot", action="store_true", help="spot machines (GKE, tpu-vm, skypilot)")
    capacity.add_argument("--reservation", metavar="NAME", help="reserved machines (GKE, tpu-vm)")
    capacity.add_argument("--project", metavar="ID", help="Google Cloud project (tpu-vm)")
    capacity.add_argument("--zone", metavar="ZONE", help="Google Cloud zone (tpu-vm)")
    capacity.add_argument("--partition", metavar="NAME", help="partition of Slurm")
    capacity.add_argument("--account", metavar="NAME", help="account of Slurm")
    capacity.add_argument("--time", metavar="D-HH:MM:SS", help="Slurm time limit of one attempt")


def run_launch(parsed: argparse.Namespace) -> int:
    """Generate the file, then print or submit it."""
    from jvgen.launch.plan import Options
    from jvgen.launch.targets import TARGETS as targets
    from jvgen.launch.targets import generate, submit

    names = Options.__dataclass_fields__
    options = Options(**{name: getattr(parsed, name) for name in names} | {"environment": tuple(parsed.environment)})
    target = targets[parsed.target]
    text = generate(
        target, experiment_of(parsed), str(parsed.config), tuple(parsed.assignments), options, _command(parsed)
    )
    if parsed.submit:
        return submit(target, text)
    sys.stdout.write(text)
    return 0


def _command(parsed: argparse.Namespace) -> str:
    """The command line that makes the same file."""
    from jvgen.launch.plan import Options
    from jvgen.launch.targets import flag_name

    words = ["jvgen", "launch", parsed.target, str(parsed.config)]
    words += [word for assignment in parsed.assignments for word in ("--set", assignment)]
    for name, field in Options.__dataclass_fields__.items():
        value = getattr(parsed, name)
        if name == "environment":
            words += [word for setting in value for word in ("--env", setting)]
        elif value is True:
            words.append(flag_name(name))
        elif value not in (None, False) and value != field.default:
            words += [flag_name(name), str(value)]
    return shlex.join(words)
