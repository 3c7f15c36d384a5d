"""Shell scripts of `jvgen launch`, run with stand-ins for `srun`, `gcloud` and `jvgen` that write down their calls."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from commands import FOLDER, IMAGE, launch, launch_file  # noqa: E402

from jvgen.launch.machines import accelerator_type, topology  # noqa: E402
from jvgen.launch.plan import OWN_VARIABLES  # noqa: E402
from jvgen.launch.targets import TARGETS  # noqa: E402

SCRIPTS = sorted(path for path in FOLDER.iterdir() if path.suffix in (".sh", ".sbatch"))

# Runs the command once per task, one after the other, and ends as srun does: with the largest status.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "srun $1" >>calls; shift; done
worst=0
for ((task = 0; task < SLURM_NTASKS; task++)); do
  SLURM_PROCID=$task "$@"
  code=$?
  [ $code -gt $worst ] && worst=$code
done
exit $worst
"""
# Ends with the code that its attempt and task have in the file `codes`; "kill" is SIGKILL to the shell around it too.
JVGEN = """#!/bin/bash
task=${SLURM_PROCID:-${JVGEN_PROCESS_ID:-0}}
echo "jvgen $task $*" >>calls
attempt=$(grep -c "^jvgen $task " calls)
code=$(sed -n "${attempt}p" codes | cut -d' ' -f$((task + 1)))
case $code in
  kill) kill -KILL $PPID; kill -KILL $$ ;;
  wait) trap 'exit 75' TERM; touch "waiting_$task"; for _ in {1..400}; do sleep 0.05; done ;;
  *) exit "$code" ;;
esac
"""


def tool(folder: Path, name: str, text: str) -> None:
    file = folder / "bin" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)


def environment(folder: Path, **more: str) -> dict[str, str]:
    return os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"} | more


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_it_and_no_pipe_follows_the_program(script):
    subprocess.run(["bash", "-n", script], check=True)
    for line in script.read_text().splitlines():
        if "jvgen train" in line or 'jvgen "$@"' in line:
            assert "|" not in line, line


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
    subprocess.run(["shellcheck", "--shell=bash", script], check=True)


# codes of the two tasks -> status of the script, and whether it requeues itself.
@pytest.mark.parametrize(
    "codes, restarts, status, requeued",
    [
        ("0 0", 0, 0, False),
        ("75 75", 0, 0, True),
        ("0 75", 3, 0, True),
        ("134 75", 0, 0, True),
        ("kill 75", 0, 0, True),
        ("75 2", 0, 2, False),
        ("kill 65", 0, 65, False),
        ("75 75", 5, 75, False),
    ],
)
def test_a_slurm_job_requeues_itself_by_the_codes_of_its_tasks(tmp_path, codes, restarts, status, requeued):
    text = launch_file(
        "slurm configs/demo_image_vae.py --topology cpu:1x2 --workdir /runs/x --max-restarts 5 --set seed=3"
    )
    (tmp_path / "job").write_text(text)
    (tmp_path / "codes").write_text(f"{codes}\n")
    tool(tmp_path, "srun", SRUN)
    tool(tmp_path, "jvgen", JVGEN)
    tool(tmp_path, "scontrol", '#!/bin/bash\necho "scontrol $*" >>calls\n')
    slurm = {"SLURM_JOB_ID": "12", "SLURM_JOB_NAME": "x", "SLURM_NTASKS": "2", "SLURM_RESTART_COUNT": str(restarts)}
    done = subprocess.run(
        ["bash", "job"], cwd=tmp_path, env=environment(tmp_path, **slurm), capture_output=True, text=True
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert ("scontrol requeue 12" in calls(tmp_path)) == requeued
    assert "jvgen 0 train configs/demo_image_vae.py --set seed=3 --workdir /runs/x" in calls(tmp_path)
    assert "srun --kill-on-bad-exit=1" in calls(tmp_path)


def test_slurm_directives_fit_the_topology():
    text = launch_file("slurm configs/cogvideox_2b.py --topology h100:16x8 --workdir /r --partition p --time 1-0 ")
    directives = re.findall(r"^#SBATCH (.+)$", text, re.MULTILINE)
    for expected in (
        "--nodes=16", "--ntasks-per-node=8", "--gres=gpu:8", "--requeue", "--open-mode=append", "--signal=TERM@300",
        "--partition=p", "--time=1-0",
    ):  # fmt: skip
        assert expected in directives
    assert not [line for line in directives if line.startswith(("--gpus-per-task", "--signal=B"))]
    assert "export JAX_COORDINATOR_PORT=" in text


@pytest.mark.parametrize("gpu", ["a100-40gb", "h100-pcie", "h200-nvl"])
def test_slurm_takes_gpus_that_no_cloud_machine_has(gpu):
    text = launch_file(f"slurm configs/demo_image_vae.py --topology {gpu}:2x4 --workdir /r")
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=4\n" in text and "--gres=gpu:4" in text
    assert "--xla_gpu_enable_latency_hiding_scheduler=true" in text


def words_of(export: str, **inherited: str) -> list[str]:
    """The words of XLA_FLAGS after a script's line of it."""
    script = f'set -u\nDEVICES=2\n{export}\nprintf "%s" "$XLA_FLAGS"'
    done = subprocess.run(["bash", "-c", script], env=inherited, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_flags_of_the_user_come_after_those_of_the_file():
    """Those of `--env` after those of the shell, which come after the preset; of two equal flags the last counts."""
    text = launch_file(
        "slurm configs/demo_image_vae.py --topology h100:1x8 --workdir /r --env 'XLA_FLAGS=--xla_a=1 --xla_b=$2'"
    )
    (export,) = re.findall(r"^export XLA_FLAGS=.*$", text, re.MULTILINE)
    words = words_of(export, XLA_FLAGS="--xla_a=0")
    assert words[-3:] == ["--xla_a=0", "--xla_a=1", "--xla_b=$2"] and len(words) > 5
    assert words_of(export)[-2:] == ["--xla_a=1", "--xla_b=$2"]


def test_local_processes_have_the_devices_of_the_topology_whatever_flags_there_are():
    text = launch_file("local configs/demo_image_vae.py --topology cpu:2x2 --workdir /r --env XLA_FLAGS=--xla_a=1")
    (export,) = re.findall(r"^export XLA_FLAGS=.*$", text, re.MULTILINE)
    count = "--xla_force_host_platform_device_count="
    assert words_of(export, XLA_FLAGS=f"{count}8") == [f"{count}8", "--xla_a=1", f"{count}2"]


@pytest.mark.parametrize("script, target", [("local", "local"), ("slurm", "slurm"), ("gke-gpu", "gke_gpu"),
                                            ("gke-tpu", "gke_tpu"), ("skypilot", "skypilot")])  # fmt: skip
def test_variables_that_a_file_sets_cannot_be_given(script, target):
    """`--env` of a name that the file assigns would be there twice, or change what the file does."""
    text = next(FOLDER.glob(f"{target}.*")).read_text()
    assigned = re.findall(r"^(?:export )?([A-Z_]+)=", text, re.MULTILINE)
    assigned += re.findall(r"^ *(?:- name: )?([A-Z_]+)(?:: |$)", text, re.MULTILINE)
    free = {"PATH", "XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "JAX_COORDINATOR_PORT", "DEVICES"}
    known = {*TARGETS[script].variables, *OWN_VARIABLES}
    assert set(assigned) - free <= known, set(assigned) - free - known


@pytest.mark.parametrize("target, topology", [("gke-gpu", "h100:1x8"), ("gke-tpu", "v5e:2x4")])
def test_a_manifest_is_created_not_applied(tmp_path, monkeypatch, target, topology):
    """`kubectl apply` starts nothing where a JobSet of that name has ended, and says that all is well."""
    exists = 'echo "$*" >calls; cat >sent; echo "jobsets \\"x\\" already exists" >&2; exit 1'
    tool(tmp_path, "kubectl", f"#!/bin/bash\ncd {tmp_path}\n{exists}\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    status, _, _ = launch(
        f"{target} configs/demo_image_vae.py --topology {topology} --workdir gs://bucket/x --image i --submit"
    )
    assert status == 1 and calls(tmp_path) == ["create -f -"] and "kind: JobSet" in (tmp_path / "sent").read_text()


def test_logs_of_local_processes_are_local():
    text = launch_file("local configs/demo_image_vae.py --topology cpu:2x2 --workdir gs://bucket/x")
    assert "\nLOGS=demo-image-vae_processes\n" in text


def start_local(folder: Path, codes: str, *options: str) -> subprocess.Popen:
    text = launch_file(
        f"local configs/demo_image_vae.py --topology cpu:2x2 --workdir {folder / 'run'} {shlex.join(options)}"
    )
    (folder / "local.sh").write_text(text)
    (folder / "codes").write_text(codes)
    tool(folder, "jvgen", JVGEN)
    return subprocess.Popen(
        ["bash", "local.sh"], cwd=folder, env=environment(folder),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    "codes, status, attempts",
    [("0 0\n", 0, 1), ("75 134\n0 0\n", 0, 2), ("134 2\n", 2, 1), ("75 75\n75 75\n75 75\n", 75, 3)],
)
def test_local_processes_restart_together(tmp_path, codes, status, attempts):
    script = start_local(tmp_path, codes, "--max-restarts", "2")
    output, _ = script.communicate(timeout=60)
    assert script.returncode == status, output
    assert len([call for call in calls(tmp_path) if call.startswith("jvgen 1 ")]) == attempts


def test_sigterm_to_the_local_script_stops_every_process(tmp_path):
    script = start_local(tmp_path, "wait wait\n")
    deadline = time.monotonic() + 30
    while not all((tmp_path / f"waiting_{task}").exists() for task in range(2)):
        assert time.monotonic() < deadline and script.poll() is None
        time.sleep(0.01)
    script.send_signal(signal.SIGTERM)
    output, _ = script.communicate(timeout=30)
    assert script.returncode == 75 and "exit codes 75 75" in output, output


# The queued resource goes through the states in the file `states`, one per `describe`.
GCLOUD = """#!/bin/bash
printf '%q ' "$@" >>calls; echo >>calls
case "$*" in
  *describe*) state=$(sed -n 1p states); sed -i 1d states
    case $state in
      ABSENT) echo "ERROR: NOT_FOUND: Resource was not found." >&2; exit 1 ;;
      UNKNOWN) echo "ERROR: network unreachable" >&2; exit 1 ;;
    esac
    echo "$state" ;;
  *is-active*) sed -n 1p training; sed -i 1d training ;;
  *tee*) for word; do case $word in --command=*) printf '%s\\n' "${word#--command=}" >remote ;; esac; done ;;
esac
"""


# Chips -> the shape that they are given, where several have the same longest side or none is a cube.
COMPACT = {
    256: "4x8x8", 1024: "8x8x16", 1280: "8x8x20", 1536: "8x12x16", 1792: "8x8x28", 2304: "12x12x16", 2688: "8x12x28",
    3584: "8x16x28", 4224: "8x12x44", 4480: "8x20x28", 4608: "12x16x24", 4992: "8x12x52", 5184: "12x12x36",
    5376: "12x16x28", 5632: "8x16x44", 6144: "16x16x24",
}  # fmt: skip


def run_tpu_vm(
    folder: Path, step: str, states: str, options: str = "", training: str = "", gcloud: str = GCLOUD
) -> tuple[int, list[str]]:
    text = launch_file(
        f"tpu-vm configs/cogvideox_2b.py --workdir gs://bucket/runs/x --image {IMAGE} --zone us-z --project p {options}"
    )
    (folder / "tpu_vm.sh").write_text(text)
    (folder / "states").write_text("".join(f"{state}\n" for state in states.split()))
    (folder / "training").write_text("".join(f"{state}\n" for state in training.split()))
    tool(folder, "gcloud", gcloud)
    done = subprocess.run(
        ["bash", "tpu_vm.sh", step], cwd=folder, env=environment(folder, POLL_SECONDS="0"),
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    kinds = {"create": "create", "describe": "describe", "delete": "delete", "is-active": "training", "tee": "start"}
    found = [next(kind for word, kind in kinds.items() if word in call) for call in calls(folder)]
    return done.returncode, [kind for kind in found if kind not in ("describe", "training")]


def test_tpu_vms_are_ordered_awaited_and_started(tmp_path):
    status, steps = run_tpu_vm(
        tmp_path, "up", "ABSENT WAITING_FOR_RESOURCES PROVISIONING ACTIVE", "--topology v5p:4x4x8 --slices 2 --spot"
    )
    # One start per slice.
    assert status == 0 and steps == ["create", "start", "start"]
    create = next(call for call in calls(tmp_path) if "create" in call)
    for expected in (
        "--accelerator-type=v5p-256", "--runtime-version=v2-alpha-tpuv5", "--node-count=2", "--spot", "--zone=us-z",
    ):  # fmt: skip
        assert expected in create


def test_a_failed_order_starts_nothing(tmp_path):
    status, steps = run_tpu_vm(tmp_path, "up", "ABSENT PROVISIONING FAILED", "--topology v6e:4x4")
    assert status != 0 and steps == ["create"]


def test_preempted_tpu_vms_are_ordered_again(tmp_path):
    """Active, then suspended: deleted and created; ends when training does."""
    states = "ABSENT ACTIVE  ACTIVE SUSPENDED SUSPENDED  ABSENT ACTIVE  ACTIVE"
    status, steps = run_tpu_vm(tmp_path, "keep", states, "--topology v6e:16x16", training="active inactive")
    assert status == 0 and steps == ["create", "start", "delete", "create", "start"]


def test_a_failed_question_does_not_restart_a_run(tmp_path):
    """A state that is not known for a moment is not that of machines that are gone."""
    states = "UNKNOWN UNKNOWN  ACTIVE ACTIVE  ACTIVE UNKNOWN ACTIVE"
    status, steps = run_tpu_vm(tmp_path, "keep", states, "--topology v6e:16x16", training="active active inactive")
    assert status == 0 and steps == ["start"]
    # Without rights, say, `up` ends instead of asking for ever.
    folder = tmp_path / "up"
    folder.mkdir()
    assert run_tpu_vm(folder, "up", "UNKNOWN", "--topology v6e:16x16") == (1, [])


def test_vms_on_which_nothing_was_started_are_not_at_the_end(tmp_path):
    """The start fails on the first of two slices, for example for its image: systemd calls an unknown unit inactive."""
    failing = GCLOUD.replace("*tee*) ", "*tee*) [ -e started ] || { touch started; exit 1; }; ")
    states = "ABSENT ACTIVE  ACTIVE ACTIVE ACTIVE ACTIVE ACTIVE"
    status, steps = run_tpu_vm(
        tmp_path, "keep", states, "--topology v6e:4x4 --slices 2", training="inactive", gcloud=failing
    )
    assert status == 0 and steps == ["create", "start", "start", "start", "start"]


@pytest.mark.parametrize("chips, shape", COMPACT.items())
def test_shapes_that_google_gives_to_a_number_of_chips(chips, shape):
    """As in MaxText's accelerator_to_spec_map.py: the longest side is the shortest, then the most nearly cubic."""
    assert accelerator_type(topology(f"v5p:{shape}")) == f"v5p-{2 * chips}"


def test_a_reservation_is_the_one_that_was_named(tmp_path):
    """Only the alpha command takes its name; `--reserved` would take any that fits."""
    run_tpu_vm(tmp_path, "create", "", "--topology v6e:4x4 --reservation mine")
    (create,) = [call for call in calls(tmp_path) if "create" in call]
    assert create.startswith("alpha compute tpus") and "--reservation=mine" in create and "--reserved" not in create


def test_a_run_directory_on_a_tpu_vm_outlives_its_container(tmp_path):
    """`docker run --rm` removes what the container wrote, at every restart."""
    assert run_tpu_vm(tmp_path, "start", "", "--topology v6e:2x2 --workdir '/disk/my runs/50%'")[0] == 0
    unit = (tmp_path / "remote").read_text()
    words = shlex.split(re.search(r"^ExecStart=((?:.*\\\n)*.*)$", unit, re.MULTILINE)[1].replace("\\\n", " "))
    folder = "/disk/my runs/50%%"  # of systemd
    assert words[words.index("--volume") + 1] == f"{folder}:{folder}" and words[-2:] == ["--workdir", folder]


def test_the_unit_on_a_tpu_vm(tmp_path):
    """Restarts by the table, gets its arguments unchanged, and systemd accepts it."""
    options = "--topology v5e:2x4 --grace-seconds 300 --env 'A=100% \"of $B\" `c` \\d'"
    assert run_tpu_vm(tmp_path, "start", "", options)[0] == 0
    remote = (tmp_path / "remote").read_text()
    unit = remote.split("<<'UNIT'\n")[1].split("\nUNIT\n")[0]
    assert "RestartPreventExitStatus=1 2 65 74\n" in unit and "Restart=on-failure" in unit
    assert "docker stop --time 300" in unit and "TimeoutStopSec=330" in unit
    command = re.search(r"^ExecStart=((?:.*\\\n)*.*)$", unit, re.MULTILINE)[1].replace("\\\n", " ")
    # systemd's own escapes, after which its quoting is that of a shell.
    words = shlex.split(command.replace("$$", "$").replace("%%", "%"))
    assert words[words.index(IMAGE) :] == [IMAGE, "train", "configs/cogvideox_2b.py", "--workdir", "gs://bucket/runs/x"]
    assert 'A=100% "of $B" `c` \\d' in words
    if shutil.which("systemd-analyze"):
        for name in ("docker", "fuser", "timeout"):
            tool(tmp_path, name, "#!/bin/sh\n")
        file = tmp_path / "jvgen.service"
        file.write_text(unit.replace("/usr/bin/", f"{tmp_path}/bin/").replace("Requires=docker.service\n", ""))
        done = subprocess.run(["systemd-analyze", "verify", file], capture_output=True, text=True)
        assert "jvgen.service" not in done.stderr, done.stderr
