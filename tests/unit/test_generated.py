"""`jvgen evaluate` on clips that runs generate: which measures there are, what they need, and their values."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen import config
from jvgen.data.builders.scenes import build_scenes
from jvgen.data.scenes.scenes import SceneConfig
from jvgen.evaluation import vbench
from jvgen.evaluation.camera_pose import Matches
from jvgen.evaluation.distribution import Moments, frechet_distance
from jvgen.evaluation.generated import measure_clips, measure_same_trajectory, measure_views
from jvgen.geometry.cameras import Cameras, project
from jvgen.geometry.paths import default_intrinsics, named_paths
from jvgen.interop.to_torch import export_network
from jvgen.models.dinov2.config import Dinov2Config
from jvgen.models.dinov2.model import Dinov2
from jvgen.nn.network import Network
from jvgen.runs import analysis
from jvgen.runs.evaluation import _described, _networks, _prepare
from jvgen.runs.generation import clip_rate, sample_request
from jvgen.runs.held_out import SamplingOptions, generate_views, read_held_out
from jvgen.runs.inference import open_run
from jvgen.tasks.text_to_video import TextToVideo
from jvgen.training.checkpoint.initial import write_first_checkpoint
from jvgen.training.experiment import Experiment

sys.path.insert(0, str(Path(__file__).parents[1]))
from toy_clip import write_toy_clip  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilations", "one_device")

CONFIGS = Path(__file__).parents[2] / "configs"
FROM_CLIP = "clip_text, clip_frames, background_consistency"


def clips_of(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)


# Measures of arrays.


def test_clips_are_measured_beside_recorded_ones():
    """A still clip is smooth; the distance is that of the features; what was not given is listed with its option."""
    recorded = clips_of(3, 9, 16, 16)
    generated = np.repeat(recorded[:, :1], 9, axis=1)
    found, missing = measure_clips(
        generated, recorded, ["a"] * 3, features=lambda clips: jnp.mean(clips, axis=(2, 3, 4))
    )
    assert found["generated/temporal_flickering"] == found["generated/adjacent_ssim"] == pytest.approx(1.0, abs=1e-5)
    step = np.abs(np.diff(recorded.astype(float), axis=1)).mean() / 255
    assert found["recorded/temporal_flickering"] == pytest.approx(1 - step, abs=1e-5)
    assert found["recorded/adjacent_ssim"] < 0.5
    assert (found["generated/motion_smoothness"], found["generated/dynamic_degree"]) == (1.0, 0.0)
    assert found["generated/sharpness"] > 0 and found["recorded/noise"] > 50
    sides = [Moments.of((side / 255.0).mean(axis=(2, 3, 4))) for side in (recorded, generated)]
    assert found["fvd"] == pytest.approx(frechet_distance(*sides), rel=1e-3) and found["fvd_made_clips"] == 3
    assert missing == {FROM_CLIP: "give --clip-model DIR", "subject_consistency": "give --dinov2 DIR"}


@pytest.mark.parametrize(
    "shape, features, expected",
    [
        ((2, 3, 16, 16), None, {"fvd": "give --i3d FILE"}),
        ((2, 3, 16, 16), jnp.sum, {"fvd": "clips have 3 frames, I3D takes 9 or more"}),
        ((1, 9, 16, 16), jnp.sum, {"fvd": "a covariance needs two clips or more: raise --samples"}),
        (
            (2, 3, 8, 16),
            None,
            {"adjacent_ssim, dynamic_degree, motion_smoothness": "frames of 8x16 are smaller than 12x12"},
        ),
        ((2, 2, 16, 16), None, {"motion_smoothness": "clips have 2 frames, and none between two others"}),
        ((2, 1, 16, 16), None, {"measures over time": "the run's clips have one frame"}),
    ],
)
def test_what_cannot_be_measured_says_why(shape, features, expected):
    found, missing = measure_clips(clips_of(*shape), clips_of(*shape), ["a"] * shape[0], features=features)
    assert expected.items() <= missing.items() and "fvd" not in found


def test_clips_of_which_one_frame_is_looked_at_have_no_dynamic_degree():
    clips, name = clips_of(1, 3, 16, 16), "generated/dynamic_degree"
    found, missing = measure_clips(clips, clips, ["a"], frames_per_second=24.0)
    assert name not in found and missing["dynamic_degree"] == "clips of 3 frames at 24 frames/s are too short"
    assert name in measure_clips(clips, clips, ["a"], frames_per_second=16.0)[0]
    with pytest.raises(ValueError, match="1 frame of a clip of 24 frames per second"):
        vbench.is_dynamic(clips[0], 24.0)


def test_views_are_measured_against_their_cameras():
    """Matches of points seen by the cameras give small errors; by other cameras, large ones."""
    size, views, frames = (48, 64), 2, 3
    intrinsics = default_intrinsics(views, frames, size[1] / size[0])
    extrinsics = named_paths("circle", views, frames, 1.0)
    points = np.random.default_rng(0).uniform(-1, 1, (60, 3)) + np.array([0, 0, 4.0])
    # Each frame holds its number, from which the matcher knows its camera.
    videos = np.zeros((1, views, frames, *size, 3), np.uint8)
    videos[0] += np.arange(views * frames, dtype=np.uint8).reshape(views, frames, 1, 1, 1)

    def matcher(first, second):
        places = [divmod(int(image.flat[0]), frames) for image in (first, second)]
        seen = [project(points, Cameras(intrinsics[place], extrinsics[place]), size)[:, :2] for place in places]
        return Matches(*seen, 120)

    cameras = Cameras(intrinsics[None], extrinsics[None])
    found = measure_views(videos, cameras, "generated", matcher)
    assert found["generated/frames/pairs"] == 4 and found["generated/views/pairs"] == 3
    assert found["generated/views/precision"] == 1.0 and found["generated/views/matching_score"] == 0.5
    assert found["generated/frames/rotation_auc_5"] > 0.9 and found["generated/frames/matches"] == 60
    wrong = Cameras(cameras.intrinsics, cameras.extrinsics[:, ::-1])
    assert measure_views(videos, wrong, "generated", matcher)["generated/views/precision"] < 0.9


def test_views_of_one_trajectory_should_be_equal():
    first = clips_of(2, 3, 8, 8)
    assert measure_same_trajectory(first, first) == {"same_trajectory/mse": 0.0, "same_trajectory/psnr": 100.0}
    found = measure_same_trajectory(np.full((1, 2, 4, 4, 3), 51, np.uint8), np.zeros((1, 2, 4, 4, 3), np.uint8))
    assert found["same_trajectory/mse"] == pytest.approx(0.04)
    assert found["same_trajectory/psnr"] == pytest.approx(-10 * np.log10(0.04))


# Runs.


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> str:
    """Still clips of 5 frames, seen by a moving camera."""
    folder = str(tmp_path_factory.mktemp("scenes") / "scenes")
    still = SceneConfig(height=16, width=16, frames=5, kinds={"static": 1.0}, supersampling=1, objects=(1, 1))
    build_scenes(folder, still, train=2, validation=6, workers=1)
    return folder


def tiny(name: str, scenes: str, vae: Path, **changes: object) -> Experiment:
    """A demo's config, made tiny."""
    values = {
        "task.vae_weights": vae, "task.latents": "pixels", "task.spatial_compression": 2, "task.sampler.steps": 2,
        "task.validation_timesteps": 1, "task.denoiser.layers": 1, "task.denoiser.heads": 2,
        "task.denoiser.head_width": 8, "task.denoiser.text_width": 16, "task.denoiser.text_length": 16,
        "task.denoiser.condition_width": 16, "task.text.length": 16, "task.text.encoder.width": 16,
        "task.text.encoder.layers": 1, "task.text.encoder.heads": 2, "data.sources.0.path": scenes,
        "data.evaluation_sources.0.path": scenes, "data.threads": 1, "optimizer.kind": "adamw",
        "data.buckets.0.batch_size": 8, "data.buckets.0.height": 16, "data.buckets.0.width": 16,
        "data.buckets.0.frames": 5, **changes,
    }  # fmt: skip
    return config.override(config.load(CONFIGS / name), [f"{path}={value}" for path, value in values.items()])


def new_run(folder: Path, name: str, scenes: str, vae: Path, **changes: object) -> Path:
    """A run of it that has not begun."""
    write_first_checkpoint(tiny(name, scenes, vae, **changes), folder / "run", {})
    return folder / "run"


@pytest.fixture(scope="module")
def grown(scenes, vae_folder) -> Experiment:
    """A run that has images and small clips too."""
    vae = {"task.vae.block_channels": "8,8", "task.vae.groups": 4, "task.vae.layers_per_block": 1}
    made = tiny("demo_image_latents.py", scenes, vae_folder(0), **vae)
    (large,) = made.data.buckets
    large = large.replace(frames=3, strides=(2,))
    buckets = (large.replace(frames=1, strides=(1,)), large.replace(height=12, width=12), large)
    return made.replace(data=made.data.replace(buckets=buckets))


def test_a_run_is_measured_by_its_largest_clips(grown):
    """As `jvgen sample` makes them; their rate is that of every second recorded frame."""
    loader = _prepare(grown, None, 1, SamplingOptions(samples=3), None, None).loader
    held_out = read_held_out(SimpleNamespace(experiment=grown, task=grown.task.build()), loader, 3)
    assert held_out.size == (3, 16, 16) and held_out.frames_per_second == 4.0
    request = sample_request(grown)
    assert held_out.size == (request.frames, request.height, request.width)
    # Files of sampled clips have the rate at which frames are taken, where the config says it.
    assert clip_rate(grown) == 8
    large = grown.data.buckets[2].replace(strides=(1,), frames_per_second=4.0)
    assert clip_rate(grown.replace(data=grown.data.replace(buckets=(*grown.data.buckets[:2], large)))) == 4.0
    assert _networks(held_out, SimpleNamespace(features=None, clip=None, subjects=None))["frames_per_second"] == 4.0


def test_the_guidance_that_clips_were_made_with_is_noted(grown):
    def noted(kind: str, **options: float) -> tuple:
        task = grown.task.replace(guidance=grown.task.guidance.replace(kind=kind, scale=6.0))
        found = _described(grown.replace(task=task), SamplingOptions(samples=1, **options))
        return found["guidance_kind"], found["guidance"]

    assert noted("none") == ("none", 1.0) and noted("none", guidance=3.0) == ("constant", 3.0)
    assert noted("dynamic") == ("dynamic", 6.0) and noted("constant", guidance=1.0) == ("none", 1.0)


def test_layers_are_analyzed_on_the_largest_clips(grown, tmp_path, monkeypatch):
    """Batches of images and of small clips are left out: they are not averaged with the others."""
    write_first_checkpoint(grown, tmp_path / "run", {})
    seen = []

    def analyze_layers(self, parameters, frozen, batch, key, timestep):
        seen.append(batch["video"].shape[1:])
        return {"frames": jnp.full((1, batch["video"].shape[1]), 2.0)}

    monkeypatch.setattr(TextToVideo, "analyze_layers", analyze_layers)
    loader = analysis._prepare(grown, None, (500.0,), 2)
    ((_, found),) = analysis._measure(open_run(tmp_path / "run"), loader, (500.0,), 2)
    assert set(seen) == {(3, 16, 16, 3)}
    np.testing.assert_array_equal(found["frames"], np.full((1, 3), 2.0))


@pytest.fixture(scope="module")
def view_run(tmp_path_factory, scenes, vae_folder) -> Path:
    vae = {"block_channels": "8,8", "groups": 4, "layers_per_block": 1}
    changes = {f"task.vae.{name}": value for name, value in vae.items()}
    sync = {"task.denoiser.sync.every": 1, "task.denoiser.sync.groups": 4}
    other = {"data.buckets.1.height": 16, "data.buckets.1.width": 16, "data.buckets.1.frames": 3}
    batch = {"data.buckets.1.batch_size": 8}
    folder = tmp_path_factory.mktemp("views")
    return new_run(folder, "demo_multiview.py", scenes, vae_folder(0), **changes, **sync, **other, **batch)


def test_a_multi_view_run_is_measured(view_run, tmp_path, jvgen):
    """Every measure of views through the command; held-out clips are not measured twice."""
    clip = write_toy_clip(tmp_path / "clip")
    words = ("evaluate", view_run, "--batches", 1, "--samples", 8, "--seed", 3, "--batch-size", 2, "--guidance", 1)
    done = jvgen(*words, "--clip-model", clip, "--out", tmp_path / "found.json", "--report", tmp_path / "report.html")
    assert done.status == 0, done.err
    found = json.loads((tmp_path / "found.json").read_text())
    metrics = found["metrics"]
    # The data set has six such scenes.
    assert (found["samples"], found["seed"], found["guidance"], found["sampler_steps"]) == (8, 3, 1.0, 2)
    assert metrics["samples"] == 6 and metrics["generated/frames/pairs"] == 6 * 2 * 2
    assert metrics["generated/views/pairs"] == metrics["recorded/views/pairs"] == 6 * 3
    wanted = {"temporal_flickering", "adjacent_ssim", "clip_text", "clip_frames", "background_consistency"}
    wanted |= {"dynamic_degree", "motion_smoothness", "sharpness", "views/precision", "frames/matching_score"}
    assert {f"{side}/{name}" for side in ("generated", "recorded") for name in wanted} < set(metrics)
    assert {"same_trajectory/mse", "same_trajectory/psnr", "validation_loss", "loss"} < set(metrics)
    assert found["not_measured"] == {"fvd": "give --i3d FILE", "subject_consistency": "give --dinov2 DIR"}
    assert found["weights"] == {"clip_model": str(clip)}
    assert "fvd: not measured: give --i3d FILE" in done.out
    page = (tmp_path / "report.html").read_text()
    assert "generated/views/precision" in page and "not measured" in page and "image/gif" in page


def test_views_are_generated_for_each_sets_own_cameras(view_run):
    """The same as by `jvgen sample`'s code for one set, whatever is in the batch with it."""
    loaded = open_run(view_run)
    prepared = _prepare(loaded.experiment, None, 1, SamplingOptions(samples=3), None, None)
    held_out = read_held_out(loaded, prepared.loader, 3)
    assert held_out.clips.shape == (3, 2, 3, 16, 16, 3) and len(set(held_out.captions)) > 1
    options = SamplingOptions(samples=3, steps=1, batch=8)
    made, equal = generate_views(loaded, held_out, options)
    alone, _ = generate_views(
        loaded,
        type(held_out)(held_out.clips[:1], held_out.captions[:1], Cameras(*(part[:1] for part in held_out.cameras))),
        options,
    )
    assert made.shape == equal.shape == held_out.clips.shape
    assert np.abs(made[0].astype(int) - alone[0]).max() <= 1
    assert (made[0] != made[1]).any() and (made[0, 1] != equal[0, 1]).any()


def test_a_text_to_video_run_is_measured(tmp_path, scenes, vae_folder, jvgen, monkeypatch):
    """From cached latents: clips of the run's own sampler, beside recorded ones, with an I3D; and mistakes."""
    vae = {"block_channels": "8,8", "groups": 4, "layers_per_block": 1}
    changes = {f"task.vae.{name}": value for name, value in vae.items()} | {"task.latents": "data"}
    latents = tmp_path / "latents"
    built = jvgen("data", "build", "latents", scenes, "--vae", vae_folder(0), "--size", "16x16", "--out", latents)
    assert built.status == 0, built.err
    run = new_run(tmp_path, "demo_image_latents.py", str(latents), vae_folder(0), **changes)
    monkeypatch.setattr("jvgen.evaluation.i3d.features", lambda file: lambda clips: jnp.mean(clips, axis=(2, 3, 4)))
    monkeypatch.setattr("jvgen.evaluation.i3d.MIN_FRAMES", 2)
    words = ("evaluate", run, "--batches", 1)
    encoder = Dinov2Config(width=8, layers=1, heads=2, hidden=16, patch=56, side=224)
    network = Network.of(lambda rngs: Dinov2(encoder, rngs=rngs))
    export_network(encoder, jax.jit(network.init)(jax.random.key(0)), tmp_path / "dinov2")
    options = ("--i3d", "i3d.safetensors", "--dinov2", tmp_path / "dinov2", "--out", tmp_path / "found.json")
    done = jvgen(*words, "--samples", 4, "--steps", 1, *options)
    assert done.status == 0, done.err
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["metrics"]["fvd_made_clips"] == 4 and found["metrics"]["fvd"] > 0 and found["sampler_steps"] == 1
    assert found["not_measured"] == {FROM_CLIP: "give --clip-model DIR"}
    assert found["weights"] == {"i3d": "i3d.safetensors", "dinov2": str(tmp_path / "dinov2")}
    assert 0 < found["metrics"]["generated/subject_consistency"] <= 1
    for more, message in (
        (
            ("--i3d", "i3d.safetensors"),
            "--i3d i3d.safetensors: it measures predicted or generated clips; give --samples",
        ),
        (("--clip-model", tmp_path), "it measures generated clips; give --samples N"),
        (("--dinov2", tmp_path), "it measures generated clips; give --samples N"),
        (("--samples", 1, "--dinov2", vae_folder(0)), "holds a network of ImageVAEConfig; give a folder of"),
        (("--lpips-weights", "lpips.safetensors"), "TextToVideoConfig measures no perceptual distance"),
        (("--samples", -1), "must be at least 0"),
        (("--samples", 1, "--steps", 1001, "--i3d", "i3d.safetensors"), "steps = 1001: must be at most 1000"),
    ):
        done = jvgen(*words, *more)
        assert done.status == 2 and message in done.err
