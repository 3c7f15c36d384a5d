"""`jvgen sample --cameras`: the files it writes for a multi-view run, and its error messages."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jvgen import config
from jvgen.data.builders.scenes import build_scenes
from jvgen.data.scenes.scenes import SceneConfig
from jvgen.data.video_files import decode_window
from jvgen.evaluation.epipolar_sheets import epipolar_sheet
from jvgen.geometry import paths, rotations
from jvgen.geometry.camera_file import CameraTrack, read_cameras, write_cameras
from jvgen.geometry.cameras import Cameras, compose, project, share_a_center
from jvgen.runs.view_sampling import fitting_batch, pairs_without_baseline, read_views
from jvgen.tasks.task import SampleRequest
from jvgen.training.checkpoint.initial import write_first_checkpoint

pytestmark = pytest.mark.usefixtures("quick_compilations")

CONFIG = Path(__file__).parents[2] / "configs" / "demo_multiview.py"
REQUEST = SampleRequest(frames=3, height=8, width=16)


@pytest.fixture(scope="module")
def changes(tmp_path_factory, vae_folder) -> list[str]:
    """What makes the demo's config tiny, on a few scenes: still clips of 5 frames, moving ones of 3."""
    scenes = SceneConfig(
        height=16, width=16, frames=5, kinds={"static": 0.5, "dynamic": 0.5}, supersampling=1, objects=(1, 1)
    )
    folder = str(tmp_path_factory.mktemp("multiview") / "scenes")
    build_scenes(folder, scenes, train=24, validation=8, workers=1)
    values = {
        "task.vae.block_channels": "8,8", "task.vae.groups": "4", "task.vae.layers_per_block": "1",
        "task.vae_weights": str(vae_folder(0)), "task.latents": "pixels", "task.spatial_compression": "2",
        "task.sampler.steps": "2", "task.denoiser.layers": "1", "task.denoiser.heads": "2",
        "task.denoiser.head_width": "8", "task.denoiser.text_width": "16", "task.denoiser.text_length": "16",
        "task.denoiser.condition_width": "16", "task.denoiser.sync.every": "1", "task.denoiser.sync.groups": "4",
        "task.text.length": "16", "task.text.encoder.width": "16", "task.text.encoder.layers": "1",
        "task.text.encoder.heads": "2", "data.sources.0.path": folder, "data.evaluation_sources.0.path": folder,
        "data.threads": "1", "optimizer.kind": "adamw", "training.steps": "2", "training.tensorboard": "false",
        "checkpoint.every": "2",
    }  # fmt: skip
    for bucket, frames in ((0, 5), (1, 3)):
        sizes = {"height": 16, "width": 16, "batch_size": 8, "frames": frames}
        values |= {f"data.buckets.{bucket}.{name}": str(value) for name, value in sizes.items()}
    return [f"{path}={value}" for path, value in values.items()]


@pytest.fixture(scope="module")
def run(tmp_path_factory, changes):
    """A run that has not begun."""
    folder = tmp_path_factory.mktemp("run")
    write_first_checkpoint(config.override(config.load(CONFIG), changes), folder / "run", {})
    return folder / "run"


@pytest.mark.slow
def test_both_kinds_of_batches_are_trained_on(changes, tmp_path, jvgen):
    words = [word for change in changes for word in ("--set", change)]
    done = jvgen("train", CONFIG, *words, "--workdir", tmp_path / "run")
    assert done.status == 0, done.err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["bucket"] for row in rows] == ["1x5x16x16", "1x3x16x16"]


@pytest.mark.slow
def test_views_are_trained_and_made_with_a_first_frame_of_each(changes, tmp_path, jvgen):
    words = [*changes, "task.condition=first_frame", "task.denoiser.in_channels=8", "task.caption_dropout=0"]
    words = [word for change in words for word in ("--set", change)]
    done = jvgen("train", CONFIG, *words, "--workdir", tmp_path / "run")
    assert done.status == 0, done.err
    images = []
    for view, color in enumerate(((220, 30, 30), (30, 30, 220))):
        images += ["--image", tmp_path / f"{view}.png"]
        Image.fromarray(np.full((16, 16, 3), color, np.uint8)).save(images[-1])
    asked = ("sample", tmp_path / "run", "--prompt", "a red ball", "--cameras", "circle", "--views", 2)
    done = jvgen(*asked, *images, "--out", tmp_path / "clips")
    assert done.status == 0, done.err
    clips = {path.name for path in (tmp_path / "clips").glob("*/view_*.mp4")}
    assert clips == {"view_0.mp4", "view_1.mp4"}
    done = jvgen(*asked, "--out", tmp_path / "none")
    assert done.status == 2 and "--image FILE" in done.err
    done = jvgen(*asked, *images, *images[:2], "--out", tmp_path / "three")
    assert done.status == 2 and "--image is given 3 times for 2 views" in done.err


def test_views_of_a_named_path(run, jvgen, tmp_path):
    words = ("sample", run, "--prompt", "a red ball", "--cameras", "circle", "--views", 3, "--out", tmp_path / "clips")
    done = jvgen(*words)
    assert done.status == 0, done.err
    (folder,) = [path for path in (tmp_path / "clips").iterdir() if path.is_dir()]
    names = {"grid.mp4", "epipolar.png"} | {f"view_{view}.{kind}" for view in range(3) for kind in ("mp4", "txt")}
    assert {path.name for path in folder.iterdir()} == names
    assert decode_window((folder / "view_2.mp4").read_bytes(), range(3)).shape == (3, 16, 16, 3)
    assert decode_window((folder / "grid.mp4").read_bytes(), [0]).shape == (1, 32, 32, 3)
    track = read_cameras(folder / "view_1.txt")
    np.testing.assert_allclose(track.extrinsics, paths.named_paths("circle", 3, 3)[1], atol=1e-8)
    row = json.loads((tmp_path / "clips" / "index.jsonl").read_text())
    assert (row["cameras"], row["views"], row["frames"]) == (["circle"], 3, 3)
    again = jvgen(*words)
    assert again.status == 0 and "1 sets existed already" in again.out
    other = jvgen(*words, "--seed", 1)
    assert other.status == 2 and "made with other settings (seed = 0, now 1)" in other.err


def test_views_of_a_run_without_a_vae(changes, vae_folder, tmp_path, jvgen):
    """A run on cached latents: the command takes the VAE that made them, and tells of prompts that are too long."""
    latents = [*changes, "task.latents=data", "task.vae=none", "task.vae_weights=none", "task.sampler.steps=1"]
    experiment = config.override(config.load(CONFIG), latents)
    still = experiment.data.replace(buckets=experiment.data.buckets[:1])
    write_first_checkpoint(experiment.replace(data=still), tmp_path / "run", {})
    words = ("sample", tmp_path / "run", "--prompt", "a red ball moves left", "--cameras", "circle")
    done = jvgen(*words, "--out", tmp_path / "none")
    assert done.status == 2 and "give --vae DIR, the VAE that made the latents" in done.err
    done = jvgen(*words, "--vae", vae_folder(0), "--out", tmp_path / "clips")
    assert done.status == 0, done.err
    assert len(list((tmp_path / "clips").glob("*/view_*.mp4"))) == 2
    assert "a prompt has more than 16 tokens; cut off: 's left'" in done.err
    assert json.loads((tmp_path / "clips" / "index.jsonl").read_text())["vae"] == str(vae_folder(0))


def test_mistakes_are_reported_before_weights_are_read(run, jvgen, tmp_path):
    def error_of(*words) -> str:
        done = jvgen("sample", run, "--prompt", "a", "--out", tmp_path / "x", *words)
        assert done.status == 2
        return done.err

    assert "cameras = 'spiral': must be one of circle" in error_of("--cameras", "spiral")
    assert "camera file 'none.txt' does not exist" in error_of("--cameras", "none.txt")
    assert "--cameras: name a path (circle, hemisphere, interpolate, dolly) or camera files" in error_of("--views", 2)
    assert "the run's config names a VAE" in error_of("--cameras", "circle", "--vae", "vae")
    assert "--enhance: not valid with --cameras" in error_of("--cameras", "circle", "--enhance", 2.0)
    assert "do not divide over 8 devices; take --batch-size 8" in error_of(
        "--cameras", "circle", "--views", 3, "--batch-size", 2
    )


def files_of(folder, frames: int = 6, count: int = 2) -> list[str]:
    made = []
    for view in range(count):
        extrinsics = paths.named_paths("dolly", 2, frames)[view] @ np.block(
            [[np.eye(3), np.ones((3, 1))], [0, 0, 0, 1]]
        )
        track = CameraTrack("x", np.arange(frames), np.tile([0.5, 0.89, 0.5, 0.5], (frames, 1)), extrinsics)
        write_cameras(folder / f"{view}.txt", track)
        made.append(str(folder / f"{view}.txt"))
    return made


def test_camera_files_are_fitted_to_the_clips(tmp_path):
    files = files_of(tmp_path)
    made = read_views(files, None, REQUEST, distance=0.5, shared_world_frame=False)
    assert made.extrinsics.shape == (2, 3, 3, 4)
    np.testing.assert_allclose(made.extrinsics[:, 0], np.broadcast_to(np.eye(3, 4), (2, 3, 4)), atol=1e-8)
    np.testing.assert_allclose(made.extrinsics[1, -1], paths.named_paths("dolly", 2, 6)[1, -1], atol=1e-8)
    # Square pixels stay square: fx of the width is fy of the height.
    np.testing.assert_allclose(made.intrinsics[..., 0] * 16, made.intrinsics[..., 1] * 8, rtol=1e-3)
    together = read_views(files, 2, REQUEST, distance=0.5, shared_world_frame=True)
    assert np.abs(together.extrinsics[1, 0] - np.eye(3, 4)).max() < 1e-8, "both start at the same point of the world"


def test_incompatible_camera_files(tmp_path):
    files = files_of(tmp_path)
    with pytest.raises(
        ValueError, match="--views 4, but 2 camera files: give one for each view, or the name of a path"
    ):
        read_views(files, 4, REQUEST, distance=0.5, shared_world_frame=False)
    # The 65th view of a set would draw the noise of the first view of the next.
    for words, views in (["circle"], 65), ([files[0]] * 65, None):
        with pytest.raises(ValueError, match="--views 65: must be at most 64"):
            read_views(words, views, REQUEST, distance=0.5, shared_world_frame=False)
    with pytest.raises(ValueError, match="0.txt has 6 cameras, fewer than the 9 requested frames"):
        read_views(files, 2, SampleRequest(9, 8, 16), distance=0.5, shared_world_frame=False)
    (tmp_path / "longer").mkdir()
    longer = files_of(tmp_path / "longer", frames=7)
    with pytest.raises(ValueError, match="camera files of different lengths .*0.txt: 6, .*1.txt: 7.* cut them to one"):
        read_views([files[0], longer[1]], 2, REQUEST, distance=0.5, shared_world_frame=False)


def turned_files(folder, motions: np.ndarray) -> list[str]:
    """Camera files of views `V F 3 4` that start turned, away from the origin of their world."""
    start = paths.look_at(np.array([2.0, -1.0, 3.0]), np.array([0.1, 0.4, -0.3]))
    made = []
    for view, motion in enumerate(motions):
        frames = len(motion)
        # Each view has a world of its own.
        turn = np.concatenate(
            [rotations.exponential(np.array([0.1, 0.2, -0.1]) * (view + 1)), np.zeros((3, 1))], axis=1
        )
        track = CameraTrack(
            "x", np.arange(frames), paths.default_intrinsics(1, frames, 2.0)[0], compose(motion, compose(start, turn))
        )
        made.append(str(folder / f"turned_{view}.txt"))
        write_cameras(made[-1], track)
    return made


def test_decimals_of_camera_files_are_no_baseline(tmp_path):
    """Nine decimals put the first cameras 1e-9 apart: lines between such centers have random directions."""
    moving = read_views(
        turned_files(tmp_path, paths.named_paths("circle", 2, 3)), 2, REQUEST, distance=0.5, shared_world_frame=False
    )
    same = [bool(share_a_center(*moving.extrinsics[:, frame])) for frame in range(3)]
    assert same == [True, False, False]
    axes = np.array([[0.0, 0.3, 0.0], [0.2, 0.0, 0.1]])[:, None] * np.arange(3.0)[:, None]
    turning = np.concatenate([rotations.exponential(axes), np.zeros((2, 3, 3, 1))], axis=-1)
    turned = read_views(turned_files(tmp_path, turning), 2, REQUEST, distance=0.5, shared_world_frame=False)
    assert pairs_without_baseline(turned) == [(0, 1)]
    np.testing.assert_allclose(turned.extrinsics, turning, atol=1e-8)


def test_views_without_a_baseline_are_reported():
    apart = Cameras(paths.default_intrinsics(3, 4, 1.0), paths.named_paths("circle", 3, 4))
    assert pairs_without_baseline(apart) == []
    assert pairs_without_baseline(apart._replace(extrinsics=apart.extrinsics[[0, 1, 0]])) == [(0, 2)]


@pytest.mark.parametrize("views, devices, least", [(4, 8, 2), (3, 8, 8), (2, 1, 1), (8, 4, 1), (6, 4, 2)])
def test_views_fit_the_mesh(views, devices, least):
    assert fitting_batch(None, views, devices) == least
    assert fitting_batch(2 * least, views, devices) == 2 * least
    assert least * views % devices == 0


def test_lines_of_the_epipolar_sheet_go_through_the_marked_points():
    """A white dot in a black world, seen by two cameras: its epipolar line crosses it in the other view."""
    extrinsics = np.stack([paths.named_paths("circle", 2, 2, distance=1.0)[view, -1:] for view in range(2)])
    cameras = Cameras(paths.default_intrinsics(2, 1, 4 / 3), extrinsics)
    point = np.array([[0.1, 0.05, 1.2]])
    seen = [project(point, Cameras(*(part[view, 0] for part in cameras)), (192, 256))[0, :2] for view in range(2)]
    videos = np.zeros((2, 1, 192, 256, 3), np.uint8)
    sheet = epipolar_sheet(videos, cameras, points=[tuple(seen[0] / [256, 192])])
    x, y = (int(round(value)) for value in seen[1])
    near = sheet[y - 2 : y + 3, 258 + x - 2 : 258 + x + 3]
    assert near.max() > 100, "the line passes within two pixels"
    assert sheet[:, 258:].max(axis=-1).astype(bool).mean() < 0.05
