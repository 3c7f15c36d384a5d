"""What a user gives to sampling besides weights: noise, files of prompts, names of clips; what is refused and how."""

import json

import numpy as np
import pytest

from jvgen.runs.clip_folder import plan_clips
from jvgen.runs.noise import read_noise
from jvgen.runs.prompts import read_prompts

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
