"""Mistakes of `jvgen launch`: each is one message that names the option, before anything is started."""

import shlex
import sys
from pathlib import Path

import pytest

from jvgen.cli.main import main
from jvgen.launch.plan import Options
from jvgen.launch.targets import TARGETS, generate
from jvgen.training.experiment import load_experiment

sys.path.insert(0, str(Path(__file__).parent))
from commands import IMAGE, ROOT, launch  # noqa: E402

BUCKET = "--workdir gs://bucket/runs/x"
DEMO = f"configs/demo_image_vae.py {BUCKET}"
POD = f"configs/cogvideox_2b.py {BUCKET} --image {IMAGE}"
MISTAKES = {
    "no chip": (f"gke-tpu {POD} --topology 4x4", "write CHIP:SHAPE"),
    "unknown chip": (f"gke-tpu {POD} --topology v9:4x4", "chip 'v9' is not known"),
    "no such slice": (f"gke-tpu {POD} --topology v5p:4x4x6", "three ascending multiples of 4"),
    "descending slice": (f"gke-tpu {POD} --topology v5p:8x4x4", "three ascending multiples of 4"),
    "too many cubes": (f"gke-tpu {POD} --topology v4:16x16x32", "at most 4096 chips"),
    "no such plane": (f"gke-tpu {POD} --topology v6e:4x16", "v6e comes as 2x2, 2x4"),
    "slices of GPUs": (f"gke-gpu {POD} --topology h100:4x8 --slices 2", "only TPUs come in slices"),
    "GPU nodes without size": (f"gke-gpu {POD} --topology h100:32", "NODESxDEVICES"),
    "four of eight GPUs": (f"gke-gpu {POD} --topology h100:8x4", "a node of gke-gpu has 8 GPUs"),
    "GPUs on TPU nodes": (f"gke-tpu {POD} --topology h100:4x8", "gke-tpu is for TPU; for GPU use slurm or gke-gpu"),
    "TPUs under Slurm": (f"slurm {DEMO} --topology v5p:2x2x2", "for TPU use gke-tpu or tpu-vm"),
    "Ironwood as VMs": (
        f"tpu-vm {POD} --topology tpu7x:4x4x4 --zone z --project p", "tpu7x is offered on GKE only"
    ),
    "a shape that VMs do not come in": (
        f"tpu-vm {POD} --topology v5p:4x4x16 --zone z --project p", "gets 4x8x8 for 256"
    ),
    "mesh": (f"gke-tpu {POD} --topology v5p:4x4x8 --set mesh.seq=3", "multiple of 3 devices, but there are 128"),
    "slices that do not divide": (
        f"gke-tpu {POD} --topology v5p:4x4x8 --slices 3 --set data.buckets.0.batch_size=96 --set mesh.fsdp=1 "
        "--set mesh.data=2 --set mesh.seq=192",
        "data x fsdp must be a multiple of 3",
    ),
    "batch": (f"gke-tpu {POD} --topology v5p:8x8x8", "batch_size = 64 must be a multiple of 128"),
    "name": (f"gke-tpu {POD} --topology v5p:4x4x8 --name My_Run", "--name 'My_Run': at most 28"),
    "long name": (f"gke-tpu {POD} --topology v5p:4x4x8 --name {'x' * 29}", "at most 28"),
    "no image": (f"gke-tpu {DEMO} --topology v5e:2x4", "gke-tpu needs --image"),
    "image under Slurm": (f"slurm {POD} --topology h100:4x8", "--image is for gke-tpu and gke-gpu and tpu-vm"),
    "queue under Slurm": (f"slurm {DEMO} --topology h100:4x8 --queue q", "--queue is for gke-tpu and gke-gpu; slurm"),
    "local folder": (
        f"gke-tpu configs/cogvideox_2b.py --image {IMAGE} --topology v5p:4x4x8 --workdir runs/x", "do not share that"
    ),
    "bucket without checkpoints": (
        f"gke-gpu {DEMO.replace('gs://', 's3://')} --image {IMAGE} --topology h100:4x8", "Orbax writes checkpoints to gs://"
    ),
    "config outside": (
        f"gke-tpu {ROOT}/configs/cogvideox_2b.py {BUCKET} --image {IMAGE} --topology v5p:4x4x8",
        "give the path relative to it",
    ),
    "restart code": (f"gke-tpu {POD} --topology v5p:4x4x8 --restart-code 2", "--restart-code = '2'"),
    "grace": (f"gke-tpu {POD} --topology v5p:4x4x8 --grace-seconds 5", "--grace-seconds 5: at least 30"),
    "restarts that SkyPilot does not count": (
        f"skypilot {DEMO} --topology h100:4x8 --max-restarts 3", "skypilot has no use for it"
    ),
    "environment": (f"gke-tpu {POD} --topology v5p:4x4x8 --env A", "--env 'A': write NAME=VALUE"),
    "another restart code": (
        f"slurm {DEMO} --topology h100:1x8 --env JVGEN_RESTART_CODE=2",
        "sets JVGEN_RESTART_CODE itself; use --restart-code",
    ),
    "a variable of the script": (f"slurm {DEMO} --topology h100:1x8 --env WORKDIR=/x", "sets WORKDIR itself; leave it"),
    "a variable of the file": (
        f"gke-gpu {DEMO} --image {IMAGE} --topology h100:1x8 --env LD_LIBRARY_PATH=/x", "sets LD_LIBRARY_PATH itself"
    ),
    "a name with a space": (f"slurm {DEMO} --topology h100:1x8 --partition 'a b'", "--partition 'a b': a name has no"),
    "an empty image": (f"gke-tpu {DEMO} --topology v5e:2x4 --image ''", "gke-tpu needs --image"),
    "no bucket": (
        "gke-tpu configs/demo_image_vae.py --workdir gs:// --image i --topology v5e:2x4", "'gs://': names no bucket"
    ),
    "a setting of two lines": (f"slurm {DEMO} --topology h100:1x8 --set 'name=a\nb'", "its value has several lines"),
    "an environment in eight processes": (
        f"slurm configs/mbrl_metaworld.py {BUCKET} --topology h100:1x8", "runs in one process (with all of its devices)"
    ),
    "spot and reserved": (
        f"gke-tpu {POD} --topology v5p:4x4x8 --spot --reservation pool", "machines are either spot or reserved"
    ),
    "GPUs that GKE has no machine for": (
        f"gke-gpu {DEMO} --image {IMAGE} --topology a100-40gb:1x8", "or slurm, which takes every GPU"
    ),
    "config": (f"gke-tpu configs/cogvideox_3b.py {BUCKET} --image {IMAGE} --topology v5p:4x4x8", "cogvideox_2b.py"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_message(mistake):
    arguments, expected = MISTAKES[mistake]
    status, output, errors = launch(arguments)
    assert status == 2 and not output
    message, hint = errors.strip().splitlines()
    assert message.startswith("jvgen launch: ") and expected in message, message
    assert "JVGEN_TRACEBACK" in hint


@pytest.mark.parametrize(
    "flag, words",
    [("--slices 0", "argument --slices: '0': must be at least 1"),
     ("--max-restarts -1", "argument --max-restarts: '-1': must be at least 0")],
)  # fmt: skip
def test_numbers_of_flags(capsys, flag, words):
    with pytest.raises(SystemExit, match="2"):
        main(["launch", *shlex.split(f"gke-tpu {POD} --topology v5p:4x4x8 {flag}")])
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("target, tool", [("slurm", "sbatch"), ("gke-gpu", "kubectl"), ("skypilot", "sky")])
def test_a_missing_tool(monkeypatch, tmp_path, target, tool):
    monkeypatch.setenv("PATH", str(tmp_path))
    image = f"--image {IMAGE}" if target == "gke-gpu" else ""
    status, output, errors = launch(f"{target} {DEMO} {image} --topology h100:1x8 --submit")
    assert status == 2 and not output
    *warnings, message, hint = errors.splitlines()
    assert f"--submit: {tool} is not installed here" in message and len(warnings) == (target == "gke-gpu")


def test_data_and_weights_that_an_image_does_not_hold():
    status, _, errors = launch(f"gke-tpu {POD} --topology v5p:4x4x8 --set data.sources.0.path=gs://bucket/latents")
    named = [part for part in errors.replace(": ", ", ").split(", ") if " = " in part]
    assert status == 0 and named == [
        "task.text.weights = 'weights/t5_v1_1_xxl'", "task.text.tokenizer = 'weights/t5_v1_1_xxl'",
        "data.evaluation_sources.0.path = 'data/latents_480x720'. Name buckets",
    ]  # fmt: skip
    assert "data-and-weights" in errors
    assert launch(f"slurm {DEMO} --topology h100:1x8")[2] == ""


def test_a_run_directory_that_no_pod_has():
    """A folder that the manifest does not mount is one of each pod: its checkpoints would end with it."""
    command = f"configs/demo_image_vae.py --workdir /runs/x --image {IMAGE} --topology v6e:2x2"
    assert "--workdir /runs/x: the file mounts nothing there" in launch(f"gke-tpu {command}")[2]
    # A VM has the folder, and its container gets it.
    assert "mounts nothing" not in launch(f"tpu-vm {command} --zone z --project p")[2]


def test_a_config_that_the_image_does_not_hold(capsys):
    experiment = load_experiment(ROOT / "configs/demo_image_vae.py")
    for config in ("configs/mine.py", "mine/configs/mine.py", "gs://bucket/runs/x/config.json"):
        options = Options(topology="v6e:2x2", workdir="gs://bucket/x", image=IMAGE)
        generate(TARGETS["gke-tpu"], experiment, config, (), options, "")
        warned = f"CONFIG {config} has to be in the image too" in capsys.readouterr().err
        assert warned == config.startswith("mine")
