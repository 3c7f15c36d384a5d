"""Which text-to-video runs diffusers' pipeline can hold, and what of them it does by default in another way."""

import functools
import json

import pytest

from jvgen.data.stream.config import DataConfig, SourceConfig
from jvgen.diffusion.objective import ObjectiveConfig
from jvgen.diffusion.sampler import SamplerConfig
from jvgen.diffusion.schedule import ScheduleConfig
from jvgen.interop.digest import content_digest
from jvgen.models.byte_text.config import ByteTextConfig
from jvgen.models.cogvideox_vae.config import CogVideoXVAEConfig
from jvgen.models.dinov2.config import Dinov2Config
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.models.t5.config import T5Config
from jvgen.models.video_dit.config import AggregationConfig, VideoDiTConfig
from jvgen.runs.exporting import _check_vae
from jvgen.runs.pipeline_export import notes, obstacles, tokenizer_files
from jvgen.tasks.alignment import AlignmentConfig
from jvgen.tasks.text import TextConfig
from jvgen.tasks.text_to_video import TextToVideoConfig

CONFIG = TextToVideoConfig(
    denoiser=VideoDiTConfig(
        layers=1, heads=2, head_width=8, in_channels=4, out_channels=4, text_width=8, text_length=226,
    ),
    text=TextConfig(
        encoder=T5Config(vocabulary=16, width=8, layers=1, heads=1, head_width=8, hidden=8), length=226,
        weights="none/encoder", tokenizer="none/tokenizer",
    ),
    vae=CogVideoXVAEConfig.tiny(), vae_weights="none/vae", schedule=ScheduleConfig(kind="cogvideox", snr_shift=3.0),
    objective=ObjectiveConfig(target="v"), sampler=SamplerConfig(kind="ddim", step_to="stride"),
)  # fmt: skip
OBSTACLES = {
    "gates": ({"denoiser": CONFIG.denoiser.replace(aggregation=AggregationConfig())}, "no class with RepVideo's gates"),
    "bytes": ({"text": TextConfig(encoder=ByteTextConfig(width=8), length=226)}, "ByteTextConfig is no T5"),
    "no VAE": ({"vae": None, "vae_weights": None}, "task.vae = none"),
    "image VAE": ({"vae": ImageVAEConfig.tiny()}, "ImageVAEConfig is not diffusers' AutoencoderKLCogVideoX"),
    "shift": ({"latent_shift": 0.1}, "task.latent_shift = 0.1"),
    "shorter captions": ({"text": CONFIG.text.replace(length=5)}, "task.text.length = 5: the pipeline pads"),
    "flow": (
        {"schedule": ScheduleConfig(kind="rectified_flow"), "objective": ObjectiveConfig(target="velocity")},
        "no 'rectified_flow' with the target 'velocity'",
    ),
    "no files": ({}, "none/encoder"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_what_no_pipeline_can_hold_is_named(name):
    changes, said = OBSTACLES[name]
    (found,) = obstacles(CONFIG.replace(**changes))
    assert said in found


def test_every_obstacle_is_listed():
    changes = {field: value for name in ("gates", "image VAE", "shift") for field, value in OBSTACLES[name][0].items()}
    assert len(obstacles(CONFIG.replace(**changes))) == 3


def test_the_encoder_of_an_alignment_is_not_missed(monkeypatch):
    """It is in no pipeline; the other frozen networks are compared with those of the run."""
    aligned = CONFIG.replace(alignment=AlignmentConfig(encoder=Dinov2Config(), weights="none/dinov2", layer=0))
    assert ["none/encoder" in one for one in obstacles(aligned)] == [True]
    monkeypatch.setattr(TextToVideoConfig, "check_weights", lambda self: None)
    monkeypatch.setattr("jvgen.tasks.text_to_video.content_digest", str)
    monkeypatch.setattr("jvgen.tasks.text.content_digest", str)
    trained_with = aligned.build().frozen_digest()
    assert trained_with.endswith("none/vae+none/dinov2")
    assert obstacles(aligned, trained_with) == []
    (found,) = obstacles(aligned, trained_with.replace("none/vae", "other/vae"))
    assert "another content hash" in found


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"text": CONFIG.text.replace(length=12)}, ["max_sequence_length=12"]),
        ({"text": CONFIG.text.replace(unconditional="zeros")}, ["--unconditional zeros"]),
        ({"vae": CONFIG.vae.replace(encode_chunk_frames=None)}, ["encode_chunk_frames = None"]),
        ({"sampler": SamplerConfig(kind="dpm_solver_sde")}, []),
        ({"sampler": SamplerConfig(kind="dpm_solver")}, ["kind = 'dpm_solver'"]),
        ({"sampler": SamplerConfig(kind="ddim", eta=1.0)}, ["eta = 1.0"]),
    ],
)
def test_other_defaults_are_told(changes, said):
    found = notes(CONFIG.replace(**changes))
    assert len(found) == len(said) and all(text in note for text, note in zip(said, found, strict=True))


def test_half_precision_is_to_be_asked_for():
    (found,) = notes(CONFIG, "bfloat16")
    assert "torch_dtype=torch.bfloat16" in found


def test_the_vae_of_an_export_is_that_of_the_latents(tmp_path):
    """Where the run's data sets can be read; otherwise it is told that they were not."""
    for name, encoder in (("vae", "mine"), ("same", None), ("other", "0" * 64)):
        (tmp_path / name).mkdir()
        made_with = {"latents": {"format": 1, "encoder": encoder or content_digest(tmp_path / "vae")}}
        files = {"config.json": {}} if name == "vae" else {"dataset_info.json": {}, "jvgen.json": made_with}
        for file, value in files.items():
            (tmp_path / name / file).write_text(json.dumps(value))
    config = CONFIG.replace(latents="data", vae_weights=str(tmp_path / "vae"))
    check = functools.partial(_check_vae, config, trained_with="", vae=tmp_path / "vae")
    data = {name: DataConfig(sources=(SourceConfig(path=str(tmp_path / name)),), buckets=())
            for name in ("same", "other", "gone")}  # fmt: skip
    assert check(data["same"]) == []
    with pytest.raises(ValueError, match="other: its latents come from encoder 000000000000.*the VAE that made them"):
        check(data["other"])
    (found,) = check(data["gone"])
    assert "could not be compared" in found and str(tmp_path / "gone") in found


def test_only_files_of_the_tokenizer_are_taken(tmp_path):
    for name in ("tokenizer.json", "spiece.model", "config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    assert sorted(tokenizer_files(tmp_path)) == ["spiece.model", "tokenizer.json"]
