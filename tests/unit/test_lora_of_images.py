"""A LoRA of an image-to-video network with padded latent frames, and of its T5: a step, files, a merged pipeline,
sampled clips."""

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jvgen import nested
from jvgen.config import ConfigError
from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.interop.from_torch import import_folder
from jvgen.interop.lora_file import write_lora
from jvgen.interop.lora_folder import read_adapters, write_adapters
from jvgen.nn import lora
from jvgen.nn.lora import LoraConfig
from jvgen.parallel.mesh import single_device_mesh
from jvgen.runs.exporting import export_run, import_run
from jvgen.runs.published.stages import encode_captions
from jvgen.tasks.pipeline_folder import read_pipeline
from jvgen.training.config import PrecisionConfig, TrainingConfig
from jvgen.training.experiment import Experiment
from jvgen.training.program import Program

pytest.importorskip("tokenizers")
sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_pipeline import DENOISER, ENCODER, write_pipeline  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilations", "one_device")

# As CogVideoX1.5's: an offset, and patches of two frames, so that three latent frames become four.
IMAGE_TO_VIDEO = DENOISER.replace(in_channels=8, temporal_patch=2, offset_width=16)
CONFIGS = {"denoiser": IMAGE_TO_VIDEO, "text_encoder": ENCODER}
BUCKET = BucketConfig(frames=5, height=8, width=12, batch_size=2)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Experiment:
    folder = write_pipeline(tmp_path_factory.mktemp("published") / "pipeline", IMAGE_TO_VIDEO)
    return Experiment(
        name="tiny",
        task=read_pipeline(folder).replace(
            latents="pixels", lora=LoraConfig(rank=2, alpha=1.0, targets=("denoiser/", "text_encoder/"), dropout=0.1),
            denoiser_weights=str(folder / "transformer"),
        ),
        data=DataConfig(sources=(SourceConfig(path="none"),), buckets=(BUCKET,)),
        training=TrainingConfig(steps=2, precision=PrecisionConfig(compute_dtype="float32")),
    )  # fmt: skip


@pytest.fixture(scope="module")
def factors(experiment) -> dict:
    rng = np.random.default_rng(1)
    shapes = experiment.task.build().networks["lora"].shapes
    return jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), shapes)


def test_a_step(experiment):
    """The factors of all layers of both networks are trained, with those that embed given frames and the offset."""
    program = Program.build(experiment, single_device_mesh())
    state, rng = program.init(), np.random.default_rng(0)
    fields = program.task.fields(BUCKET)
    batch = {name: rng.integers(0, 7, (2, *spec.shape)).astype(spec.dtype) for name, spec in fields.items()}
    batch |= {"slot": np.arange(2, dtype=np.int32)}
    before = nested.flatten(jax.tree.map(np.asarray, state.parameters))
    assert {path.split("/")[0] for path in before} == {"lora"} and set(fields) == {"video", "tokens"}
    after, metrics = jax.jit(program.step(BUCKET))(state, jax.tree.map(jnp.asarray, batch))
    assert np.isfinite(metrics["loss"]) and metrics["skipped"] == 0
    moved = nested.flatten(after.parameters)
    for layer in ("patch_embedding/projection", "offset_embedding/output", "blocks/layers/attention/query"):
        assert np.abs(moved[f"lora/denoiser/{layer}/up"]).max() > 0, layer
    assert np.abs(moved["lora/text_encoder/blocks/layers/feed_forward/gate/up"]).max() > 0


def test_files_and_clips(experiment, factors, tmp_path, jvgen, monkeypatch):
    """What the LoRA's files make beside the pipeline, the merged pipeline makes alone."""
    seen = []
    monkeypatch.setattr(
        "jvgen.runs.published.pipeline.encode_captions",
        lambda *given, **options: seen.append((given, options)) or encode_captions(*given, **options),
    )
    folder = Path(experiment.task.denoiser_weights).parent
    write_adapters(tmp_path / "given", CONFIGS, factors, 0.5)
    with pytest.raises(ConfigError, match="--init-condition, --variant: not valid with a LoRA"):
        import_run(tmp_path / "given", experiment, tmp_path / "x", init_condition=True, variant="fp16")
    own = experiment.replace(task=experiment.task.replace(lora=experiment.task.lora.replace(alpha=2.0)))
    import_run(tmp_path / "given", own, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "lora")
    back = nested.flatten({name: one.factors for name, one in read_adapters(tmp_path / "lora", CONFIGS).items()})
    for path, leaf in nested.flatten(factors).items():
        np.testing.assert_array_equal(back[path], leaf * (0.5 if path.endswith("up") else 1.0), err_msg=path)
    with pytest.raises(ConfigError, match="--network denoiser: the run trains a LoRA alone"):
        export_run(tmp_path / "run", tmp_path / "x", network="denoiser")
    (tmp_path / "lora" / "of_an_earlier_export").touch()
    export_run(tmp_path / "run", tmp_path / "lora", overwrite=True)
    assert not (tmp_path / "lora" / "of_an_earlier_export").exists()

    export_run(tmp_path / "run", tmp_path / "whole", merge_lora=True)
    assert read_pipeline(tmp_path / "whole").condition == "first_frame"
    for name, subfolder in (("denoiser", "transformer"), ("text_encoder", "text_encoder")):
        base, merged = (import_folder(place / subfolder)[1] for place in (folder, tmp_path / "whole"))
        expected = nested.flatten(lora.merge(jax.tree.map(jnp.asarray, base), factors[name], 0.5))
        for path, leaf in nested.flatten(merged).items():
            np.testing.assert_allclose(leaf, expected[path], atol=1e-6, err_msg=path)

    Image.fromarray(np.random.default_rng(2).integers(0, 255, (8, 12, 3), np.uint8)).save(tmp_path / "first.png")
    asked = ("--prompt", "a red ball", "--steps", "1", "--devices", "1", "--image", tmp_path / "first.png")
    asked += ("--frames", "5", "--size", "8x12")
    clips = {}
    for name, words in {
        "beside": ("--weights", folder, "--lora", tmp_path / "lora", "--lora-unmerged"),
        "merged": ("--weights", tmp_path / "whole"),
    }.items():
        done = jvgen("sample", *words, *asked, "--out", tmp_path / f"{name}.npy")
        assert done.status == 0, done.err
        clips[name] = np.load(tmp_path / f"{name}.npy")
    assert clips["beside"].shape == (5, 8, 12, 3)
    np.testing.assert_allclose(clips["beside"], clips["merged"], atol=1e-4)
    # What a text encoder changes is little in so small a network's clips.
    (task, captions, placement, adapter), options = seen[0]
    assert options == {"unmerged": True} and seen[1][0][3] is None
    (merged,) = encode_captions(seen[1][0][0], captions[:1], placement).values()
    for given, unmerged, atol in ((adapter, True, 1e-5), (adapter, False, 1e-5), (None, False, None)):
        (embedding,) = encode_captions(task, captions[:1], placement, given, unmerged=unmerged).values()
        difference = np.abs(embedding - merged).max()
        assert difference < atol if atol else difference > 1e-2


def test_a_folder_of_clips_knows_the_content_of_a_lora(experiment, factors, tmp_path, jvgen, monkeypatch):
    """One that was trained further has the same name."""
    monkeypatch.setattr(
        "jvgen.runs.published.pipeline._make", lambda weights, prompts, todo, *more: [c.path.touch() for _, c in todo]
    )
    Image.fromarray(np.zeros((8, 12, 3), np.uint8)).save(tmp_path / "first.png")
    folder, file = Path(experiment.task.denoiser_weights).parent, tmp_path / "lora.safetensors"
    asked = ("sample", "--weights", folder, "--lora", file, "--prompt", "a red ball", "--image", tmp_path / "first.png")
    asked += ("--frames", "5", "--size", "8x12", "--out", tmp_path / "clips")
    write_lora(file, IMAGE_TO_VIDEO, factors["denoiser"], 0.5)
    assert jvgen(*asked).status == 0 and jvgen(*asked).status == 0
    file.unlink()
    write_lora(file, IMAGE_TO_VIDEO, factors["denoiser"], 0.6)
    other = jvgen(*asked)
    assert other.status == 2 and re.search(r"made with other settings \(lora = .*, now .*\)", other.err), other.err
    without = jvgen(*(word for word in asked if word not in ("--lora", file)))
    assert without.status == 2 and "now None" in without.err, without.err
