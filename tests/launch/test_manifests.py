"""JobSets of `jvgen launch gke-*`: against schemas, and the rules between fields that no schema has."""

import copy
import math
import os
import re
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from commands import IMAGE, launch_file  # noqa: E402
from jobset_schema import JOBSET  # noqa: E402

from jvgen import exit_codes  # noqa: E402

# The newest and the oldest Kubernetes that the manifests are for.
KUBERNETES = ("1.31", "1.35")
CRD = Path(os.environ.get("JVGEN_JOBSET_CRD", "nowhere"))
TPU = [
    ("configs/cogvideox_2b.py", "v5p:4x4x8", 2, "--spot --queue team --priority high --env A='$(B) \"c\"'"),
    ("configs/cogvideox_2b.py", "v6e:16x16", 1, "--host-network --namespace video --reservation pool"),
    ("configs/cogvideox_2b.py", "tpu7x:4x4x4", 1, "--restart-code 75 --grace-seconds 600 --max-restarts 3"),
    ("configs/cv_vae.py:causal", "v5p:2x4x4", 1, "--priority high --service-account trainer"),
    ("configs/demo_image_vae.py", "v5e:2x4", 4, "--xla-flags none --set seed=3 --env LIBTPU_INIT_ARGS=--mine=1"),
]
GPU = [
    ("configs/cogvideox_2b.py", "h200:16x8", "--spot --queue team --env XLA_FLAGS=--mine=1 --env NO=1"),
    ("configs/cogvideox_2b.py", "h100:4x8", "--host-network"),
    ("configs/demo_image_vae.py", "a100-80gb:1x8", ""),
]


@pytest.fixture(scope="module")
def manifests() -> dict[str, dict]:
    """Topology -> manifest."""
    common = f"--image {IMAGE} --workdir gs://bucket/runs/x"
    commands = [
        f"gke-tpu {config} --topology {topology} --slices {slices} {common} {more}"
        for config, topology, slices, more in TPU
    ]
    commands += [f"gke-gpu {config} --topology {topology} {common} {more}" for config, topology, more in GPU]
    names = [topology for _, topology, *_ in TPU + GPU]
    return {name: yaml.safe_load(launch_file(command)) for name, command in zip(names, commands, strict=True)}


EVERY = pytest.mark.parametrize("topology", [topology for _, topology, *_ in TPU + GPU])


def parts(manifest: dict) -> tuple[dict, dict, dict, dict]:
    """Replicated job, Job, pod and container of a manifest that has one of each."""
    (replicated,) = manifest["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    return replicated, job, pod, container


def environment(container: dict) -> dict:
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]}


@EVERY
def test_the_jobset_has_known_fields_only(manifests, topology):
    jsonschema.validate(manifests[topology], JOBSET)


def test_the_schema_notices_a_misspelled_field(manifests):
    manifest = copy.deepcopy(manifests["v5p:4x4x8"])
    manifest["spec"]["failurePolicy"]["maxRestart"] = 3
    with pytest.raises(jsonschema.ValidationError, match="maxRestart"):
        jsonschema.validate(manifest, JOBSET)


@pytest.mark.parametrize("version", KUBERNETES)
@EVERY
def test_the_job_fits_the_schema_of_kubernetes(manifests, topology, version):
    replicated, job, *_ = parts(manifests[topology])
    document = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": replicated["name"]}, "spec": job}
    kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.skipif(not CRD.is_file(), reason="JVGEN_JOBSET_CRD names no file: jobset.x-k8s.io_jobsets.yaml of JobSet")
@EVERY
def test_the_jobset_fits_its_definition(manifests, topology):
    definition = yaml.load(CRD.read_text(), yaml.CSafeLoader)
    (version,) = [item for item in definition["spec"]["versions"] if item["name"] == "v1alpha2"]
    schema = version["schema"]["openAPIV3Schema"]
    forbid_others(schema["properties"]["spec"])
    jsonschema.Draft7Validator(schema).validate(manifests[topology])


def forbid_others(schema: dict) -> None:
    """Objects with listed fields may have no others."""
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    for child in schema.values():
        for node in [child] if isinstance(child, dict) else child if isinstance(child, list) else []:
            if isinstance(node, dict):
                forbid_others(node)


@EVERY
def test_every_variable_is_there_once(manifests, topology):
    """The API server refuses two of a name; flags of the user's go into the variable of the preset."""
    entries = parts(manifests[topology])[3]["env"]
    assert len({entry["name"] for entry in entries}) == len(entries)
    values = environment(parts(manifests[topology])[3])
    if topology == "h200:16x8":
        assert values["NO"] == "1"  # which YAML would read as false
        assert values["XLA_FLAGS"].startswith("--xla_gpu_") and values["XLA_FLAGS"].endswith(" --mine=1")
    if topology == "v5e:2x4":
        assert values["LIBTPU_INIT_ARGS"] == "--mine=1"


@EVERY
def test_pods_chips_and_mesh_are_one_number(manifests, topology):
    manifest = manifests[topology]
    replicated, job, pod, container = parts(manifest)
    shape = math.prod(int(size) for size in topology.split(":")[1].split("x"))
    ((resource, per_pod),) = container["resources"]["limits"].items()
    assert job["parallelism"] == job["completions"]
    assert job["parallelism"] * per_pod == shape
    annotations = manifest["metadata"]["annotations"]
    mesh = math.prod(int(size) for size in re.findall(r"\d+", annotations["jvgen/mesh"]))
    devices_per_chip = 2 if topology.startswith("tpu7x") else 1
    assert mesh == replicated["replicas"] * job["parallelism"] * per_pod * devices_per_chip
    assert annotations["jvgen/devices"].startswith(f"{mesh} in {replicated['replicas'] * job['parallelism']} processes")
    if resource == "google.com/tpu":
        assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology.split(":")[1]
    else:
        # With several Jobs, pods of different Jobs would have the same index.
        assert replicated["replicas"] == 1


@EVERY
def test_restarts_are_those_of_the_table_of_exit_codes(manifests, topology):
    manifest = manifests[topology]
    _, job, pod, container = parts(manifest)
    # The API server refuses a podFailurePolicy with another restartPolicy, and a JobSet does not say so.
    assert pod["restartPolicy"] == "Never" and job["backoffLimit"] == 0
    evicted, ended = job["podFailurePolicy"]["rules"]
    assert evicted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert {rule["action"] for rule in (evicted, ended)} == {"FailJob"}
    no_restart = ended["onExitCodes"]["values"]
    assert no_restart == [row.code for row in exit_codes.TABLE if not row.restart and row.code]
    code = int(environment(container)["JVGEN_RESTART_CODE"])
    assert code not in no_restart and code == (75 if topology.startswith("tpu7x") else 42)


@EVERY
def test_rules_tell_evictions_mistakes_and_lost_processes_apart(manifests, topology):
    """The messages are those that Kubernetes writes into the Job's condition."""
    rules = manifests[topology]["spec"]["failurePolicy"]["rules"]

    def action(reason: str, message: str) -> str:
        for rule in rules:
            patterns = rule.get("onJobFailureMessagePatterns", [""])
            if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
                return rule["action"]
        return "RestartJobSet"

    evicted = "Pod default/x-slice-0-1-abcde has condition DisruptionTarget matching FailJob rule at index 0"
    mistake = "Container jvgen for pod default/x-slice-0-1-ab failed with exit code 2 matching FailJob rule at index 1"
    assert action("PodFailurePolicy", evicted) == "RestartJobSetAndIgnoreMaxRestarts"
    assert action("PodFailurePolicy", mistake) == "FailJobSet"
    assert action("BackoffLimitExceeded", "Job has reached the specified backoff limit") == "RestartJobSet"


@EVERY
def test_the_program_gets_signals_and_time_to_save(manifests, topology):
    _, _, pod, container = parts(manifests[topology])
    assert pod["terminationGracePeriodSeconds"] >= 120
    if container["command"] != ["jvgen"]:
        script = container["command"][2]
        assert script.endswith('; exec jvgen "$@"') and "|" not in script
    assert container["args"][0] == "train" and container["args"][-2:] == ["--workdir", "gs://bucket/runs/x"]


@EVERY
def test_names_of_pods_fit_a_dns_label(manifests, topology):
    manifest = manifests[topology]
    replicated, job, *_ = parts(manifest)
    name = manifest["metadata"]["name"]
    longest = f"{name}-{replicated['name']}-{replicated['replicas'] - 1}-{job['completions'] - 1}-abcde"
    assert len(name) <= 28 and len(longest) <= 63
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)


@pytest.mark.parametrize("topology", [topology for _, topology, *_ in GPU])
def test_gpu_pods_pass_coordinator_count_and_number_themselves(manifests, topology):
    replicated, job, _, container = parts(manifests[topology])
    values = environment(container)
    assert values["JVGEN_COORDINATOR"] == f"$(JOBSET)-{replicated['name']}-0-0.$(JOBSET):6002"
    assert values["JOBSET"] == manifests[topology]["metadata"]["name"]
    assert int(values["JVGEN_PROCESSES"]) == job["completions"] and job["completionMode"] == "Indexed"
    path = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert values["JVGEN_PROCESS_ID"] == {"fieldRef": {"fieldPath": path}}


def test_several_slices_find_each_other_one_slice_needs_nothing(manifests):
    several = environment(parts(manifests["v5p:4x4x8"])[3])
    assert several["MEGASCALE_NUM_SLICES"] == "2"
    assert several["MEGASCALE_COORDINATOR_ADDRESS"] == "$(JOBSET)-slice-0-0.$(JOBSET)"
    assert not [name for name in environment(parts(manifests["v6e:16x16"])[3]) if name.startswith("MEGASCALE")]


def test_options_arrive(manifests):
    first, second, third = (manifests[name] for name in ("v5p:4x4x8", "v6e:16x16", "tpu7x:4x4x4"))
    assert first["metadata"]["labels"] == {
        "kueue.x-k8s.io/queue-name": "team",
        "kueue.x-k8s.io/priority-class": "high",
    }
    assert parts(first)[2]["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    # Kubernetes would expand $(B).
    assert environment(parts(first)[3])["A"] == '$$(B) "c"'
    assert second["metadata"]["namespace"] == "video" and parts(second)[2]["hostNetwork"] is True
    assert parts(second)[2]["nodeSelector"]["cloud.google.com/reservation-name"] == "pool"
    assert third["spec"]["failurePolicy"]["maxRestarts"] == 3
    assert parts(third)[2]["terminationGracePeriodSeconds"] == 600
    fourth = parts(manifests["v5p:2x4x4"])
    assert fourth[2]["priorityClassName"] == "high" and fourth[2]["serviceAccountName"] == "trainer"
    assert parts(manifests["v5e:2x4"])[3]["args"][2:4] == ["--set", "seed=3"]
