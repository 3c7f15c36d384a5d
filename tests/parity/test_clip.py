"""CLIP's towers and image preparation against transformers and Pillow, its scores against their formula."""

import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from jvgen.evaluation.clip import MEAN, STD, Clip, image_features, load_clip, prepare, text_features

sys.path.insert(0, str(Path(__file__).parents[1]))
from toy_clip import SIDE, WORDS, write_toy_clip  # noqa: E402

END = WORDS.index("<end>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_toy_clip(tmp_path_factory.mktemp("clip"))


@pytest.mark.torch
@pytest.mark.parametrize("changes", [{}, {"eos_token_id": 2, "hidden_act": "gelu"}], ids=["released", "other"])
def test_features_are_those_of_transformers(folder, tmp_path, changes):
    """With the end token named by the config or, as in the first release, found as the largest id."""
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= changes
    config["vision_config"] |= {name: value for name, value in changes.items() if name == "hidden_act"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    architecture, parameters = load_clip(tmp_path)
    model = transformers.CLIPModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    rng = np.random.default_rng(0)
    tokens = np.array([[0, 4, 2, END, END, END], [0, 3, 5, 7, 6, END]])
    images = rng.standard_normal((3, SIDE, SIDE, 3)).astype(np.float32)
    with torch.no_grad():
        expected = (
            model.get_text_features(input_ids=torch.from_numpy(tokens)),
            model.get_image_features(pixel_values=torch.from_numpy(images.transpose(0, 3, 1, 2).copy())),
        )
    expected = [getattr(one, "pooler_output", one).numpy() for one in expected]
    found = (
        text_features(architecture, parameters, jnp.asarray(tokens)),
        image_features(architecture, parameters, jnp.asarray(images)),
    )
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max(), rtol=0)


@pytest.mark.parametrize("size, side", [((40, 64), SIDE), ((31, 20), SIDE), ((12, 12), SIDE), ((60, 90), 42)])
def test_images_are_prepared_as_by_pillow(size, side):
    """Bicubic to the shorter side and a center crop, in 8 bits; larger, smaller and odd pictures, and one whose longer
    side is 63 (as 504 of 480x720 with 336), where 90 x (42 / 60) is less."""
    rng = np.random.default_rng(0)
    picture = np.asarray(Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize(size[::-1], Image.BILINEAR))
    # As transformers' `get_resize_output_image_size`.
    height, width = (int(side * length / min(size)) for length in size)
    resized = np.asarray(Image.fromarray(picture).resize((width, height), Image.BICUBIC))
    top, left = (height - side) // 2, (width - side) // 2
    expected = resized[top : top + side, left : left + side] / 255.0
    found = np.asarray(prepare(jnp.asarray(picture[None]), side))[0] * np.array(STD) + np.array(MEAN)
    levels = np.abs(found - expected) * 255
    assert levels.max() < 1.01 and levels.mean() < 0.05


def test_scores_are_cosines(folder):
    clip, rng = Clip(folder), np.random.default_rng(0)
    clips = rng.integers(0, 256, (2, 3, 20, 24, 3), np.uint8)
    captions = ["a red ball moves to the left", "a blue cube " + "moves to the right " * 5]
    texts, frames = clip.captions(captions), clip.frames(clips.reshape(-1, 20, 24, 3)).reshape(2, 3, -1)
    np.testing.assert_allclose(np.linalg.norm(texts, axis=-1), 1, rtol=1e-5)
    found = clip.scores(clips, captions)
    assert found["clip_text"] == pytest.approx(np.mean([f @ t for f, t in zip(frames, texts, strict=True)]), abs=1e-6)
    pairs = [np.sum(frames[n, k] * frames[n, k + 1]) for n in range(2) for k in range(2)]
    assert found["clip_frames"] == pytest.approx(np.mean(pairs), abs=1e-6)
    assert clip.scores(clips[:, :1].repeat(3, 1), captions)["clip_frames"] == pytest.approx(1, abs=1e-5)
    assert set(clip.scores(clips[:, :1], captions)) == {"clip_text"}
    # What a caption says beyond the last position is cut, the end token stays.
    np.testing.assert_allclose(clip.captions(["a blue cube " + "moves to the right " * 9])[0], texts[1], atol=1e-6)


def test_folders_that_are_not_of_clip(folder, tmp_path):
    copied = {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors", "tokenizer.json")}

    def broken(**changes):
        for name, content in {**copied, **{k.replace("__", "."): v for k, v in changes.items()}}.items():
            (tmp_path / name).unlink(missing_ok=True)
            if content is not None:
                (tmp_path / name).write_bytes(content)
        return tmp_path

    config = json.loads(copied["config.json"])
    other = json.dumps({**config, "projection_dim": 9}).encode()
    tensors = safetensors.numpy.load(copied["model.safetensors"])
    tensors["visual_projection.weight"][0, 0] = np.nan
    damaged = safetensors.numpy.save(tensors)
    for changes, message in (
        ({"config__json": None}, "no config.json; save `CLIPModel`"),
        ({"tokenizer__json": None}, "no tokenizer.json"),
        ({"tokenizer__json": b"{}"}, "tokenizer.json is not a tokenizer"),
        ({"config__json": b'{"model_type": "t5"}'}, "model_type = 't5'; expected 'clip'"),
        ({"config__json": other}, r"text_projection.weight has shape \(8, 16\), expected \(9, 16\)"),
        ({"model__safetensors": b"{}"}, "not a valid safetensors file"),
        ({"model__safetensors": damaged}, "visual_projection.weight holds NaN or infinity. Get the file again"),
    ):
        with pytest.raises(ValueError, match=message):
            Clip(broken(**changes))
