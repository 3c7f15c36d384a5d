"""Every shipped config: it loads, says what it said, takes weights, its step lowers; at toy width it takes a step."""

import ast
import dataclasses
import functools
import math
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from jvgen import config, saved_config
from jvgen.data.stream.config import BucketConfig
from jvgen.interop.architecture import differences
from jvgen.interop.from_torch import check_weights
from jvgen.losses.perceptual import PerceptualConfig
from jvgen.models.cogvideox_vae.config import CogVideoXVAEConfig
from jvgen.models.video_dit.config import Positions
from jvgen.parallel.mesh import make_mesh, single_device_mesh
from jvgen.runs import exporting
from jvgen.tasks.task import Task
from jvgen.training.experiment import Experiment
from jvgen.training.program import Program
from jvgen.training.telemetry.metrics import to_host
from tests.configs.lone_files import files_of

ROOT = Path(__file__).parents[2]
DUMPS = Path(__file__).parent / "dumps"
FILES = sorted((ROOT / "configs").glob("*.py"))
# What `config.load` takes, by the name of the run: files with variants are several.
CONFIGS = {
    re.sub(r"\.py:?", "_", Path(choice).name).strip("_"): choice for path in FILES for choice in config.variants(path)
}
LABELS = ("Should reach:", "Chips:", "Memory:", "Time:", "Data:")

# What a field becomes at toy width, by its name, wherever it is in the tree.
TOY = {
    "layers": 1,
    "heads": 2,
    "head_width": 16,
    "hidden": 32,
    "width": 32,
    "text_width": 32,
    "condition_width": 16,
    "vocabulary": 300,
    "text_length": 8,
    "length": 8,
    "token_multiple": 8,
    "groups": 4,
    "attention_groups": 4,
    # Both codebooks and two slots are the vocabulary.
    "context_codes": 150,
    "future_codes": 148,
    "resolution": 32,
    "max_positions": 2048,
    "layers_per_block": 1,
    "batch_size": 2,
    "every": 1,
}
TOY_SIZE, TOY_FRAMES = 32, 5
# Tracing and compiling these takes long; others of the same make, or the tests of their tasks, do it in any case.
SLOW = {
    "cogvideox_2b", "cv_vae_causal", "cv_vae_sd21", "cv_vae_sd3", "cvd_2b", "demo_cv_vae", "demo_image_latents",
    "demo_control_from_scratch", "demo_control_pretrained", "demo_image_to_video", "demo_ivideogpt_tokenizer",
    "cogvideox_2b_lora", "demo_multiview",
    "image_vae_sd", "repvideo_2b", "shown_cv_vae", "shown_image_vae", "shown_text_to_video",
}  # fmt: skip
SLOW |= {name for name in CONFIGS if name.startswith(("ivideogpt_", "mbrl_metaworld_", "repvideo_2b_scratch_"))}
SLOW |= {name for name in CONFIGS if name.startswith(("cogvideox_5b_", "cogvideox1_5_5b_"))}
HEAVY = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CONFIGS]
# tests/unit/test_cli.py trains the demo's image VAE.
STEPPED = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW | {"demo_image_vae"})) for name in CONFIGS]
PER_OBJECTIVE = ("loss", "gradient_norm", "update_norm")


def toy(node, path: str = ""):
    """The same experiment with few layers, heads, channels, pixels and frames."""
    if isinstance(node, tuple):
        return tuple(toy(item, path) for item in node)
    if not dataclasses.is_dataclass(node):
        return node
    changes = {f.name: toy(getattr(node, f.name), f"{path}.{f.name}") for f in dataclasses.fields(node)}
    changes |= {name: value for name, value in TOY.items() if isinstance(changes.get(name), int)}
    if "block_channels" in changes:
        # A tokenizer's grid is not to be smaller than its patches.
        levels = changes["block_channels"][:2] if "future_codes" in changes else changes["block_channels"]
        changes["block_channels"] = tuple(8 for _ in levels)
    if "tokens_per_frame" in changes:
        changes["tokens_per_frame"] = None
    if "batch_size" in changes and "kinds" in changes:
        # Views of a pair have 9 frames, which CogVideoX's autoencoder takes; a still clip is folded into two.
        frames = {("static",): 17, ("dynamic",): 9}.get(changes["kinds"], TOY_FRAMES)
        changes |= {"height": TOY_SIZE, "width": TOY_SIZE, "frames": min(changes["frames"], frames)}
    return dataclasses.replace(node, **changes)


def toy_experiment(experiment: Experiment) -> Experiment:
    """`toy`, with what its sizes need of each other."""
    small = toy(experiment)
    task, buckets = small.task, small.data.buckets
    if isinstance(getattr(task, "vae", None), CogVideoXVAEConfig):
        # What that autoencoder takes; views have such clips already.
        buckets = tuple(bucket.replace(frames=max(bucket.frames, 9)) for bucket in buckets)
    denoiser = getattr(task, "denoiser", None)
    if getattr(denoiser, "positions", None) is Positions.ROTARY_AND_LEARNED:
        latent = TOY_SIZE // task.spatial_compression
        task = task.replace(denoiser=denoiser.replace(sample_height=latent, sample_width=latent))
    if getattr(denoiser, "offset_width", None) is not None:
        task = task.replace(denoiser=task.denoiser.replace(offset_width=denoiser.condition_width))
    return small.replace(task=task, data=small.data.replace(buckets=buckets))


@pytest.fixture(params=CONFIGS, scope="module")
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def experiment(name) -> Experiment:
    return config.load(CONFIGS[name])


def test_there_are_configs():
    assert {"cogvideox_2b", "demo_image_vae", "demo_text_to_video", "image_vae_sd"} <= set(CONFIGS)


def test_it_is_valid_and_survives_json(name, experiment):
    assert isinstance(experiment, Experiment) and experiment.name == name
    config.validate_tree(experiment)
    assert saved_config.from_json(saved_config.to_json(experiment)) == experiment


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_its_docstring_says_what_it_reaches_and_needs(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    places = [docstring.find(f"\n{label}") for label in LABELS]
    assert -1 not in places and places == sorted(places), f"a paragraph with a line each: {', '.join(LABELS)}"
    time = docstring.split("\nTime:")[1].split("\nData:")[0]
    assert re.search("estimated|measured", time), "say whether the time was estimated or measured"


def test_its_fields_change_only_on_purpose(name, experiment):
    golden = DUMPS / f"{name}.txt"
    if os.environ.get("JVGEN_UPDATE_CONFIG_DUMPS"):
        golden.write_text(config.dump(experiment))
    assert golden.is_file() and config.dump(experiment) == golden.read_text(), (
        f"{CONFIGS[name]} does not give {golden.relative_to(ROOT)}. If that is meant, run "
        "JVGEN_UPDATE_CONFIG_DUMPS=1 pytest tests/configs and commit the difference."
    )


def test_recipes_say_what_the_configs_have():
    """Every config of a paper is in docs/recipes.md, and values of fields there are those of the config."""
    rows = [
        [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in (ROOT / "docs" / "recipes.md").read_text().splitlines()
        if line.startswith("|") and not line.startswith(("|---", "| config"))
    ]
    checked = 0
    for name, setting, _, here, _ in rows:
        field = re.match(r"`([a-z0-9_.]+)`", setting)
        if field and here.startswith("`"):
            dump = (DUMPS / f"{name}.txt").read_text().splitlines()
            assert f"{field[1]} = {here.strip('`')}" in dump, f"docs/recipes.md: {name}, {field[1]} is not {here}"
            checked += 1
    assert checked >= 40
    same_recipe = re.compile(r"ivideogpt_(tokenizer|transformer)_|mbrl_metaworld_|repvideo_2b_scratch_")
    missing = {name for name in CONFIGS if not name.startswith(("demo", "shown")) and not same_recipe.match(name)} - {
        row[0] for row in rows
    }
    assert not missing, f"docs/recipes.md has no row for {sorted(missing)}"


def test_there_is_a_dump_for_every_config_and_no_other():
    assert {path.stem for path in DUMPS.glob("*.txt")} == set(CONFIGS)


@functools.cache
def built(label: str) -> Task:
    """The task of a shipped config, which takes a second for large networks."""
    return config.load(CONFIGS[label]).task.build()


def test_its_task_is_built_without_touching_a_device(name, experiment):
    before = {id(array) for array in jax.live_arrays()}
    task = built(name)
    for bucket in experiment.data.buckets:
        fields, flops = task.fields(bucket), task.flops(bucket)
        assert fields and all(len(spec.axes) == len(spec.shape) for spec in fields.values())
        assert flops and all(value > 0 for value in flops.values())
    assert {id(array) for array in jax.live_arrays()} <= before


def of_other_tasks() -> list[str]:
    """Shipped configs but those whose task differs from an earlier one's in what an agent begins with alone."""
    found = {}
    for label in CONFIGS:
        lines = (DUMPS / f"{label}.txt").read_text().splitlines()
        task = [line for line in lines if line.startswith("task.") and not line.startswith("task.demonstrations")]
        found.setdefault("\n".join(task), label)
    return list(found.values())


@pytest.mark.parametrize("label", of_other_tasks())
def test_a_lone_file_goes_into_every_shipped_config(label, tmp_path, monkeypatch):
    """Everything but the tensors' data: which network they are for, its architecture, names, shapes and dtypes."""
    experiment, task = config.load(CONFIGS[label]), built(label)
    # A LoRA's base is named in the config, and an agent's networks have no files.
    if getattr(experiment.task, "lora", None) or (
        experiment.task.collects_experience and not experiment.task.imagination
    ):
        assert task.network_configs == {}
        return
    imported = []

    def import_folder(path, network, **options):
        check_weights(path, network)
        return network, {"read": np.zeros(1)}

    monkeypatch.setattr(type(experiment.task), "build", lambda self: task)
    monkeypatch.setattr(type(experiment.task), "check_weights", lambda self: None)
    monkeypatch.setattr(exporting, "import_folder", import_folder)
    # Of the tensors' data, which are gigabytes of zeros.
    monkeypatch.setattr(exporting, "content_digest", lambda file: "digest")
    monkeypatch.setattr(
        exporting, "write_first_checkpoint", lambda run, workdir, given, record: imported.append(list(given))
    )
    assert task.network_configs
    for name, network in task.network_configs.items():
        assert differences(network, network) == []
        for file, lacks_gates in files_of(network, tmp_path).values():
            exporting.import_run(file, experiment, tmp_path / "run", network=name, init_gates=lacks_gates)
    assert imported and all(given[0] in task.network_configs for given in imported)


@pytest.mark.parametrize("name", HEAVY, indirect=True)
def test_its_training_step_lowers_for_its_mesh(experiment):
    program = Program.build(experiment, make_mesh(experiment.mesh))
    program.check()
    before = {id(array) for array in jax.live_arrays()}
    for bucket in experiment.data.buckets:
        text = program.lower(bucket).as_text()
        assert "stablehlo" in text
    # Constants of the networks are small; no state of a big model is made on the way.
    made = [array for array in jax.live_arrays() if id(array) not in before]
    assert sum(array.nbytes for array in made) < 64 * 2**20


@pytest.mark.parametrize("name", STEPPED, indirect=True)
def test_at_toy_width_it_takes_a_step(experiment, quick_compilations):
    small = toy_experiment(experiment)
    small = small.replace(
        training=small.training.replace(accumulation=1, spike_sigma=0.0), mesh=type(small.mesh)(fsdp=1)
    )
    perceptual = getattr(small.task, "perceptual", None)
    if perceptual is not None and perceptual.weights:
        small = small.replace(task=small.task.replace(perceptual=PerceptualConfig(kind="laplacian")))
    config.validate_tree(small)
    task = with_random_frozen(small.task.build())
    program = Program.build(small, single_device_mesh(), task)
    bucket = small.data.buckets[0]
    batch = program.shard_batch(fake_examples(task, bucket), bucket)
    state, metrics = program.lower(bucket).compile()(program.init(), batch)
    values = to_host(metrics)
    # Of every objective that is active in the first step; those with an update of their own have a loss alone.
    kinds = PER_OBJECTIVE if any(objective.own is None for objective in task.objectives()) else ("loss",)
    per_objective = {kind: [v for k, v in values.items() if k.split("/")[-1] == kind] for kind in kinds}
    assert all(found and max(found) > 0 and math.isfinite(sum(found)) for found in per_objective.values()), (
        per_objective
    )
    assert (values["skipped"], int(state.step)) == (0, 1)


def fake_examples(task: Task, bucket: BucketConfig) -> dict[str, np.ndarray]:
    """A batch of noise in the shapes and dtypes that the task names."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name, spec in task.fields(bucket).items():
        shape = (bucket.batch_size, *spec.shape)
        if spec.dtype == np.float32:
            arrays[name] = rng.standard_normal(shape).astype(np.float32)
        else:
            arrays[name] = rng.integers(0, 200, shape).astype(spec.dtype)
    return arrays


def with_random_frozen(task: Task) -> Task:
    """The task with random parameters in its frozen networks, instead of those of files that are not here.

    Away from their start, where zeros in the last layers hide the gradients of a LoRA.
    """
    rng = np.random.default_rng(7)

    def drawn(network) -> dict:
        start = jax.jit(network.init)(jax.random.key(7))
        return jax.tree.map(lambda leaf: np.asarray(leaf) + 0.02 * rng.standard_normal(leaf.shape, np.float32), start)

    task.load_frozen = lambda: {name: drawn(network) for name, network in task.frozen_networks.items()}
    task.initial_parameters = dict
    return task
