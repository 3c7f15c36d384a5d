"""What a user gives to sampling besides weights: noise, prompts, images, names of clips; what is refused and how."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jvgen.data.stream.config import DataConfig, SourceConfig
from jvgen.data.video_files import encode_video
from jvgen.runs.clip_folder import plan_clips
from jvgen.runs.generation import sample_request
from jvgen.runs.given_files import GivenFiles
from jvgen.runs.noise import read_noise
from jvgen.runs.prompts import MAX_LISTED, read_prompts, warn_of_truncated
from jvgen.training.config import TrainingConfig
from jvgen.training.experiment import Experiment

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_text_to_video import BUCKET, CONFIG  # noqa: E402

SHAPE = (3, 4, 6, 4)


@pytest.mark.parametrize(
    "array, said",
    [
        (np.zeros((3, 4, 6, 5)), "has the shape \\(3, 4, 6, 5\\); 2 clips of 3 latent frames of 4x6 with 4 channels"),
        (np.zeros((3, *SHAPE)), "has the shape \\(3, 3, 4, 6, 4\\)"),
        (np.zeros((2, 3, 6, 4, 4)), "need \\(2, 3, 4, 6, 4\\) or \\(2, 3, 4, 4, 6\\)"),
        (np.zeros(SHAPE, np.int32), "holds int32; expected floats"),
        (np.full(SHAPE, np.nan), "not finite"),
        (np.array(["a"], object), "not an array of numbers"),
    ],
)
def test_noise_that_is_refused(array, said, tmp_path):
    np.save(tmp_path / "noise.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=said):
        read_noise(tmp_path / "noise.npy", SHAPE, 2)


def test_prompts_that_are_too_long_are_told(capsys):
    task = CONFIG.build()
    warn_of_truncated(task, ["red", "a red ball", "a red ball", "blue"])
    assert capsys.readouterr().err == "warning: a prompt has more than 6 tokens; cut off: 'ball'\n"
    warn_of_truncated(task, [f"number {number}" for number in range(MAX_LISTED + 2)])
    told = capsys.readouterr().err.splitlines()
    assert len(told) == MAX_LISTED + 1 and told[-1] == "warning: 2 more prompts are cut off"


def test_noise_comes_in_both_layouts_for_one_clip_or_for_each(tmp_path):
    each = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32)
    for saved, expected in (
        (each, each),
        (each.transpose(0, 1, 4, 2, 3), each),
        (each[0], each[[0, 0]]),
        (each[:1].transpose(0, 1, 4, 2, 3).astype(np.float64), each[[0, 0]]),
    ):
        np.save(tmp_path / "noise.npy", saved)
        read = read_noise(tmp_path / "noise.npy", SHAPE, 2)
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, expected)
    (tmp_path / "noise.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="not an array of numbers"):
        read_noise(tmp_path / "noise.npy", SHAPE, 2)


# Prompts and names.


def test_files_of_prompts(tmp_path):
    text, entries = tmp_path / "prompts.txt", tmp_path / "VBench_full_info.json"
    text.write_text("a red ball\n\n  two dogs \na red ball\n", encoding="utf-8")
    assert read_prompts(text) == ["a red ball", "two dogs"]
    entries.write_text(
        json.dumps(
            [
                {"prompt_en": "a person is eating", "dimension": ["human_action"]},
                {"prompt_en": "a person is eating", "dimension": ["overall_consistency"]},
                {"prompt": "a cat"},
                "a dog",
            ]
        )
    )
    assert read_prompts(entries) == ["a person is eating", "a cat", "a dog"]


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("no.txt", None, "no such file"),
        ("empty.txt", " \n", "has no prompts"),
        ("empty.json", "[]", "has no prompts"),
        ("broken.json", "[", "is not JSON"),
        ("object.json", '{"prompt_en": "a"}', "expected a list"),
        ("entry.json", '["a", {"text": "b"}]', "entry 1 has no text"),
        ("number.json", "[3]", "entry 0 has no text"),
    ],
)
def test_files_of_prompts_that_are_refused(name, content, said, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=said):
        read_prompts(tmp_path / name)


def test_names_of_clips(tmp_path):
    made = plan_clips(["A cat, running", "x"], 2, tmp_path, frames=9, batch=1)
    assert [clip.path.name for clip in made][:2] == ["0000_00_a_cat_running.mp4", "0000_01_a_cat_running.mp4"]
    vbench = plan_clips(["A cat, running", "x"], 2, tmp_path, frames=9, batch=1, naming="vbench")
    names = ["A cat, running-0.mp4", "A cat, running-1.mp4", "x-0.mp4", "x-1.mp4"]
    assert [clip.path.name for clip in vbench] == names
    assert [clip.slot for clip in vbench] == [clip.slot for clip in made]
    for prompt in ("either/or", "a" * 300):
        with pytest.raises(ValueError, match="use --naming numbered"):
            plan_clips([prompt], 1, tmp_path, frames=9, batch=1, naming="vbench")


# Images and videos that clips are made from.


def picture(path, height, width, color=(200, 10, 60)):
    rows = np.linspace(0, 1, height)[:, None, None] * np.array(color)
    Image.fromarray(np.broadcast_to(rows, (height, width, 3)).astype(np.uint8)).save(path)
    return path


def test_images_of_the_same_shape_are_resized_as_diffusers_does(tmp_path):
    path = picture(tmp_path / "a.png", 24, 48)
    given = GivenFiles(images=(path,)).read(9, (8, 16), rows=[0, 3])
    wanted = np.asarray(Image.open(path).resize((16, 8), Image.Resampling.LANCZOS))
    assert given.frames.shape == (2, 1, 8, 16, 3) and given.video is None
    np.testing.assert_array_equal(given.frames[1, 0], wanted)
    # Within two percent nobody sees it.
    assert GivenFiles(images=(picture(tmp_path / "b.png", 49, 97),)).read(9, (8, 16), rows=[0]).frames.shape[2] == 8


def test_an_image_of_another_shape_is_cropped_or_padded_if_that_is_said(tmp_path):
    path = picture(tmp_path / "tall.png", 40, 20)
    with pytest.raises(ValueError, match="is 40x20 pixels, the clips are 8x16.*--fit crop .*or --fit pad"):
        GivenFiles(images=(path,)).read(9, (8, 16), rows=[0])
    crop, pad = (GivenFiles(images=(path,), fit=fit).read(9, (8, 16), [0]).frames[0, 0] for fit in ("crop", "pad"))
    # The middle of the picture fills the clip, or all of it lies between black bars.
    assert crop[0, :, 0].min() > 60 and crop[-1, :, 0].max() < 140
    assert not pad[:, :6].any() and not pad[:, 10:].any() and pad[-1, 7, 0] > 180


def test_images_for_prompts_and_last_frames(tmp_path):
    one, two = (picture(tmp_path / f"{n}.png", 8, 16, (n, n, n)) for n in (100, 250))
    given = GivenFiles(images=(one, two), last_images=(two, one)).read(9, (8, 16), rows=[1, 0, 1])
    assert given.frames.shape == (3, 2, 8, 16, 3)
    assert given.frames[:, :, -1, 0, 0].tolist() == [[250, 100], [100, 250], [250, 100]]
    assert GivenFiles(images=(one,)).digests() != GivenFiles(images=(two,)).digests()
    assert GivenFiles().digests() == {} and GivenFiles().read(9, (8, 16), [0]) is None


def test_a_video_gives_its_first_frames(tmp_path):
    frames = np.broadcast_to(np.arange(0, 180, 20, dtype=np.uint8)[:, None, None, None], (9, 16, 32, 3))
    (tmp_path / "in.mp4").write_bytes(encode_video(frames, 8.0))
    files = GivenFiles(video=tmp_path / "in.mp4")
    assert (files.size_of_video(), files.strength_of_video) == (9, 0.8)
    clip = files.read(5, (8, 16), rows=[0, 1]).video
    assert clip.shape == (2, 5, 8, 16, 3)
    assert np.abs(clip[0].mean(axis=(1, 2, 3)) - np.arange(0, 100, 20)).max() < 8
    with pytest.raises(ValueError, match="has 9 frames, the clip 17; give --frames 9 or fewer"):
        files.read(17, (8, 16), rows=[0])


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"last_images": ("a",)}, "--last-image is given 1 times, --image 0 times"),
        ({"strength": 0.5}, "--strength 0.5: .* give --video FILE"),
        ({"images": ("a",), "video": "b"}, "--image and --video: .* leave one out"),
        ({"fit": "crop"}, "--fit crop: .* give one of them"),
    ],
)
def test_flags_that_do_not_go_together(files, said):
    with pytest.raises(ValueError, match=said):
        GivenFiles(**files)


def test_files_that_are_no_images(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    for path, said in ((tmp_path / "none.png", "no such file"), (tmp_path / "text.png", "not a png, jpeg")):
        with pytest.raises(ValueError, match=f"--image .*{said}"):
            GivenFiles(images=(path,)).read(9, (8, 16), [0])
    with pytest.raises(ValueError, match="given 2 times for 3 prompts: give one for all, or one for each"):
        GivenFiles(images=(tmp_path, tmp_path)).check_count(3, "prompts")


def test_files_are_read_before_weights(tmp_path):
    """A request is only made of files that can be read and fit."""
    task = CONFIG.replace(condition="first_frame", denoiser=CONFIG.denoiser.replace(in_channels=8))
    data = DataConfig(sources=(SourceConfig(path="none"),), buckets=(BUCKET,))
    experiment = Experiment(name="x", task=task, data=data, training=TrainingConfig(steps=1))
    wide = tmp_path / "wide.png"
    Image.fromarray(np.zeros((8, 32, 3), np.uint8)).save(wide)
    for path, said in ((tmp_path / "none.png", "no such file"), (wide, "another aspect ratio")):
        with pytest.raises(ValueError, match=f"--image .*{said}"):
            sample_request(experiment, given=GivenFiles(images=(path,)))
    assert sample_request(experiment, given=GivenFiles(images=(wide,), fit="crop")).given_frames == 1
