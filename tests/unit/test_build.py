"""Builders of scenes, folders, TFDS images and latents: records match their inputs, rejected inputs are listed."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jvgen.cli.main import main
from jvgen.data.builders.assembly import merge_parts
from jvgen.data.builders.build_loop import BuildError, Execution, FilterConfig, assign_splits
from jvgen.data.builders.folders import build_images, build_videos
from jvgen.data.builders.latents import LatentsConfig, build_latents
from jvgen.data.builders.media import VideoOptions
from jvgen.data.builders.scenes import build_scenes
from jvgen.data.builders.tfds_images import build_tfds_images
from jvgen.data.scenes.labels import labels_of
from jvgen.data.scenes.scenes import SceneConfig, render_scene
from jvgen.data.store.records import Record
from jvgen.data.store.show import show
from jvgen.data.store.sources import open_source, read_metadata, splits
from jvgen.data.store.writer import Writer
from jvgen.data.stream.source_checks import check_latents
from jvgen.data.video_files import decode_window, encode_image, encode_video, probe

SCENES = SceneConfig(height=24, width=32, frames=5, background="plain")


def clip(frames: int = 12, height: int = 32, width: int = 48, tone: int = 0) -> bytes:
    video = np.zeros((frames, height, width, 3), np.uint8) + np.uint8(tone)
    video[..., 0] += np.arange(width, dtype=np.uint8) * 4 + np.arange(frames, dtype=np.uint8)[:, None, None]
    return encode_video(video, 8)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(("a.mp4", "b.mp4", "more/c.mp4", "more/d.MP4")):
        (folder / name).write_bytes(clip(10 + number, tone=number * 10))
    (folder / "captions.csv").write_text(
        'file,caption\na.mp4,"a cat, asleep"\nb.mp4,a dog\nmore/c.mp4,one\nmore/c.mp4,two\nd,found by its bare name\n'
    )
    return folder


def read_all(folder: Path) -> dict:
    found = {}
    for split in splits(folder):
        source = open_source(folder, split)
        found |= {record.id: (split, record) for record in map(source.read, range(len(source)))}
    return found


def test_scenes(tmp_path: Path) -> None:
    seen = []
    summary = build_scenes(
        tmp_path / "a", SCENES, train=9, validation=2, seed=5, progress=lambda *done: seen.append(done)
    )
    assert seen == [(n, 11) for n in range(1, 12)]
    assert sum(summary.counts["train"].values()) == 9 and sum(summary.counts["validation"].values()) == 2
    assert str(summary).startswith(str(tmp_path / "a"))
    source = open_source(tmp_path / "a", "validation")
    record, scene = source.read(1), render_scene(SCENES, 5, 10)
    assert record.captions == scene.captions and labels_of(record.captions[0]) == scene.labels
    options = read_metadata(tmp_path / "a")["options"]
    assert options["seed"] == 5 and options["height"] == 24
    again = build_scenes(tmp_path / "b", SCENES, train=9, validation=2, seed=5)
    assert again.digests == summary.digests
    assert build_scenes(tmp_path / "c", SCENES, train=9, validation=2, seed=6).digests != summary.digests


def test_processes_make_the_same_scenes(tmp_path: Path) -> None:
    one = build_scenes(tmp_path / "a", SCENES, train=20, validation=0, workers=1)
    two = build_scenes(tmp_path / "b", SCENES, train=20, validation=0, workers=2)
    assert one.digests == two.digests and list(one.counts) == ["train"]


def test_videos(videos: Path, tmp_path: Path) -> None:
    summary = build_videos(videos, tmp_path / "set", VideoOptions(validation=0.25))
    assert summary.records == 4 and not summary.rejected
    found = read_all(tmp_path / "set")
    assert {split for split, _ in found.values()} == {"train", "validation"}
    assert found["a.mp4"][1].captions == ("a cat, asleep",)
    assert found["more/c.mp4"][1].captions == ("one", "two")
    assert found["more/d.MP4"][1].captions == ("found by its bare name",)
    record = found["b.mp4"][1]
    assert record.clips == ((videos / "b.mp4").read_bytes(),)
    assert (record.kind, record.frames, record.height, record.width, record.frames_per_second) == (
        "dynamic",
        11,
        32,
        48,
        8,
    )


def test_videos_are_reencoded_on_request(videos: Path, tmp_path: Path) -> None:
    build_videos(videos, tmp_path / "set", VideoOptions(shorter_side=16, keyframe_every=4))
    for _, record in read_all(tmp_path / "set").values():
        info = probe(record.clips[0])
        assert (info.height, info.width) == (16, 24) and info.frames == record.frames
        assert info.keyframes == -(-info.frames // 4)
        original = decode_window((videos / record.id).read_bytes(), [7])[0]
        assert abs(int(decode_window(record.clips[0], [7])[0].mean()) - int(original.mean())) <= 2


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions.jsonl", '{"file": "a.mp4", "caption": ["x", "y"]}\n\n{"file": "b.mp4", "caption": "z"}\n'),
        ("captions.tsv", "caption\tfile\nx\ta.mp4\ny\ta\nz\tb.mp4\n"),
        ("a.txt", "x\ny\n"),
    ],
)
def test_other_formats_of_captions(videos: Path, tmp_path: Path, name: str, content: str) -> None:
    (videos / "captions.csv").unlink()
    (videos / name).write_text(content)
    build_videos(videos, tmp_path / "set", VideoOptions(captions_optional=True))
    captions = {id: record.captions for id, (_, record) in read_all(tmp_path / "set").items()}
    assert captions["a.mp4"][0] == "x" and captions["more/c.mp4"] == ()
    summary = build_videos(videos, tmp_path / "strict", VideoOptions(filters=FilterConfig()))
    assert {item.name for item in summary.rejected} >= {"more/c.mp4", "more/d.MP4"}
    assert {item.reason for item in summary.rejected} == {"has no caption"}


def test_missing_captions(videos: Path, tmp_path: Path) -> None:
    (videos / "captions.csv").unlink()
    with pytest.raises(ValueError, match=r"has no captions. Accepted: captions.csv .*captions.jsonl .*<clip>.txt"):
        build_videos(videos, tmp_path / "set")
    for name, text, message in (
        ("captions.csv", "path,text\na.mp4,x\n", "needs file and caption"),
        ("captions.csv", "file,caption\nq.mp4,x\n", "lists none of the 4 files.*q.mp4.*a.mp4"),
        ("captions.jsonl", "{\n", "line 1: not JSON"),
        ("captions.jsonl", '{"caption": "x"}\n', "line 1: needs a file and a caption"),
    ):
        (videos / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            build_videos(videos, tmp_path / "set", captions=videos / name)
    with pytest.raises(ValueError, match="no such file"):
        build_videos(videos, tmp_path / "set", captions=videos / "capt.csv")
    assert not (tmp_path / "set").exists()


def test_corrupt_files_are_listed_together(videos: Path, tmp_path: Path) -> None:
    (videos / "b.mp4").write_bytes(b"")
    (videos / "more/c.mp4").write_bytes((videos / "a.mp4").read_bytes()[:200])
    with pytest.raises(BuildError) as caught:
        build_videos(videos, tmp_path / "set", workers=2)
    assert "2 of 4 files" in str(caught.value) and "b.mp4: the file is empty" in str(caught.value)
    assert "more/c.mp4: not a readable video" in str(caught.value)
    assert not (tmp_path / "set").exists()
    summary = build_videos(videos, tmp_path / "set", error_budget=0.5)
    assert summary.records == 2 and [item.name for item in summary.rejected] == ["b.mp4", "more/c.mp4"]
    listed = [json.loads(line) for line in (tmp_path / "set" / "refused.jsonl").read_text().splitlines()]
    assert [item["name"] for item in listed] == ["b.mp4", "more/c.mp4"] and all(item["damaged"] for item in listed)
    assert "rejected: 2" in str(summary)


def test_a_data_set_without_a_validation_split_is_told(tmp_path: Path) -> None:
    (tmp_path / "film").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (2, 1, 32, 48, 3), np.uint8)
    (tmp_path / "film" / "a.mp4").write_bytes(encode_video(noise.repeat(12, axis=1).reshape(24, 32, 48, 3), 8))
    options = VideoOptions(captions_optional=True, scenes="cut")
    film = build_videos(tmp_path / "film", tmp_path / "one", options)
    assert film.counts == {"train": {"dynamic": 2}}
    (warning,) = film.warnings
    assert "all records are of one recording: there is no split validation" in warning
    assert "data.evaluation_sources.0.split=train" in warning
    with pytest.raises(ValueError, match="has no split 'validation'. Its splits: train .* Name one of these"):
        open_source(tmp_path / "one", "validation")
    assert not build_videos(tmp_path / "film", tmp_path / "all", dataclasses.replace(options, validation=0.0)).warnings

    # Of two recordings one is held out, and here the one that is too short.
    names = ["a.mp4", "b.mp4"]
    held_out = names[assign_splits(names, 0.05).index("validation")]
    for name in names:
        (tmp_path / "film" / name).write_bytes(clip(4 if name == held_out else 12))
    longer = dataclasses.replace(options, filters=FilterConfig(min_frames=8))
    (warning,) = build_videos(tmp_path / "film", tmp_path / "two", longer).warnings
    assert warning.startswith("no recording that was held out can be used: there is no split validation")


def test_filters(videos: Path, tmp_path: Path) -> None:
    summary = build_videos(videos, tmp_path / "set", VideoOptions(filters=FilterConfig(min_frames=12)))
    assert summary.records == 2
    assert {item.reason for item in summary.rejected} == {"10 frames, fewer than 12", "11 frames, fewer than 12"}
    with pytest.raises(BuildError, match="none of 4 files can be used.*\n.*48x32, smaller than 1x64"):
        build_videos(videos, tmp_path / "none", VideoOptions(filters=FilterConfig(min_height=64)))
    with pytest.raises(ValueError, match="kinds"):
        build_videos(videos, tmp_path / "none", VideoOptions(filters=FilterConfig(kinds=("film",))))


def test_folders_without_media(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a folder"):
        build_videos(tmp_path / "nowhere", tmp_path / "set")
    with pytest.raises(ValueError, match="contains no files ending in .mp4"):
        build_videos(tmp_path, tmp_path / "set")


def test_images(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        pixels = rng.integers(0, 255, (20 + number, 30, 3), np.uint8)
        (folder / f"{number}.png").write_bytes(encode_image(pixels))
        (folder / f"{number}.txt").write_text(f"noise {number}")
    build_images(folder, tmp_path / "set", validation=0)
    source = open_source(tmp_path / "set", "train")
    record = source.read(2)
    assert (record.kind, record.frames, record.height, record.captions) == ("image", 1, 22, ("noise 2",))
    np.testing.assert_array_equal(decode_window(record.clips[0], [0])[0], pixels)
    assert splits(tmp_path / "set") == {"train": 3}


def test_appended_scenes_and_images_are_the_new_ones(tmp_path: Path) -> None:
    """Names of jobs are ids of records, by which it is known what is there."""
    append = Execution(append=True)
    build_scenes(tmp_path / "scenes", SCENES, train=2, validation=0)
    build_scenes(tmp_path / "scenes", SCENES, train=3, validation=0, execution=append)
    assert splits(tmp_path / "scenes") == {"train": 3}
    folder = prepared_tfds_images(tmp_path / "digits" / "1.0.0")
    build_tfds_images(str(folder), tmp_path / "images", limit=2)
    build_tfds_images(str(folder), tmp_path / "images", limit=5, execution=append)
    index = open_source(tmp_path / "images", "train").index
    assert index.id.tolist() == [f"digits-train-{row:08d}" for row in range(5)]


def test_parts_of_images_with_other_captions_are_of_another_build(tmp_path: Path) -> None:
    folder = prepared_tfds_images(tmp_path / "digits" / "1.0.0")
    parts = [
        build_tfds_images(
            str(folder), tmp_path / "set", caption_template=template,
            execution=Execution(part=part, parts=2, jobs_per_unit=3),
        ).out
        for part, template in ((1, "a photo of a {}"), (2, "{}"))
    ]  # fmt: skip
    with pytest.raises(ValueError, match="another build than .*: caption_template = 'a photo of a {}' and '{}'"):
        merge_parts(parts, tmp_path / "set")


def test_images_of_a_tfds_data_set(tmp_path: Path) -> None:
    folder = prepared_tfds_images(tmp_path / "digits" / "1.0.0")
    build_tfds_images(str(folder), tmp_path / "set", validation_split="test", limit=4)
    assert splits(tmp_path / "set") == {"train": 4, "validation": 2}
    record = open_source(tmp_path / "set", "train").read(3)
    assert record.captions == ("a photo of a red panda",) and (record.height, record.width) == (9, 7)
    assert (decode_window(record.clips[0], [0]) == 30).all()
    with pytest.raises(ValueError, match="image_key = 'picture'.*image, label"):
        build_tfds_images(str(folder), tmp_path / "no", image_key="picture")
    with pytest.raises(ValueError, match="no split 'dev'. Its splits: .*train"):
        build_tfds_images(str(folder), tmp_path / "no", train_split="dev")
    with pytest.raises(ValueError, match="'no_such_images' is neither a data set known to TFDS"):
        build_tfds_images("no_such_images", tmp_path / "no", data_dir=tmp_path)
    assert not (tmp_path / "no").exists()


def prepared_tfds_images(folder: Path) -> Path:
    """A TFDS data set of gray images with class labels, as `tfds build --file_format=array_record` leaves it."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 1)),
            "label": tfds.features.ClassLabel(names=["cat", "red_panda"]),
        }
    )
    infos = []
    for split, count in (("train", 6), ("test", 2)):
        writer = ArrayRecordWriter(str(folder / f"digits-{split}.array_record-00000-of-00001"), "group_size:1")
        for number in range(count):
            picture = Image.fromarray(np.full((9, 7), number * 10, np.uint8))
            writer.write(features.serialize_example({"image": picture, "label": number % 2}))
        writer.close()
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name="digits", split=split, filetype_suffix="array_record"
        )
        infos.append(tfds.core.SplitInfo(name=split, shard_lengths=[count], num_bytes=1, filename_template=template))
    identity = tfds.core.dataset_info.DatasetIdentity(
        name="digits", version=tfds.core.Version("1.0.0"), data_dir=str(folder), module_name="digits"
    )
    info = tfds.core.DatasetInfo(builder=identity, description="gray", features=features)
    info.set_file_format("array_record")
    info.set_splits(tfds.core.SplitDict(infos))
    info.write_to_directory(folder)
    return folder


def encode_blocks(frames: np.ndarray) -> np.ndarray:
    """A stand-in for a VAE: the mean color of 8x8 blocks as mean, and as log-variance."""
    assert frames.dtype == np.uint8
    f, h, w, _ = frames.shape
    mean = frames.reshape(f, h // 8, 8, w // 8, 8, 3).mean(axis=(2, 4)) / 127.5 - 1
    return np.concatenate([mean, mean - 3], axis=-1)


def encode_all(source: Path, out: Path, size: tuple[int, int], encode=encode_blocks, digest: str = "a", **options):
    """Latents of block means; `options` of `LatentsConfig`, and of `build_latents`."""
    own = {name: options.pop(name) for name in ("execution", "progress", "overwrite") if name in options}
    return build_latents(source, out, encode, LatentsConfig(sizes=(size,), **options), encoder_digest=digest, **own)


def test_latents(tmp_path: Path) -> None:
    config = SCENES.replace(frames=9, height=40, width=64, driven=1.0, views=2, kinds={"dynamic": 1.0})
    build_scenes(tmp_path / "pixels", config, train=3, validation=1)
    seen = []
    encode_all(
        tmp_path / "pixels", tmp_path / "latents", (32, 32), frames=3, stride=2,
        progress=lambda *done: seen.append(done),
    )  # fmt: skip
    assert splits(tmp_path / "latents") == {"train": 3, "validation": 1} and seen[-1] == (4, 4)
    before, after = (open_source(tmp_path / name, "train").read(1) for name in ("pixels", "latents"))
    assert after.id == before.id and after.captions == before.captions and after.clips == ()
    assert (after.frames, after.height, after.width, after.frames_per_second) == (3, 32, 32, 4)
    assert after.latents.shape == (2, 3, 4, 4, 6) and after.latents.dtype == np.float16
    pixels = decode_window(before.clips[1], [0, 2, 4])[:, 4:36, 16:48]
    cropped_by_resize = after.latents[1, ..., :3].astype(np.float32)
    assert np.abs(encode_blocks(pixels)[..., :3] - cropped_by_resize).mean() < 0.2
    assert after.intrinsics.shape == (6, 4) and after.actions.shape == (3, 2)
    np.testing.assert_allclose(after.actions[1], before.actions[2:4].sum(axis=0), rtol=1e-6)
    # 64 pixels shrink to 51 and lose 19 of them: what was 1 / 1.6 of the height is now 1 of the width.
    np.testing.assert_allclose(after.intrinsics[0, 0], before.intrinsics[0, 0] * 51 / 32, rtol=1e-5)
    assert open_source(tmp_path / "latents", "train").index.latent_frames.tolist() == [3, 3, 3]


def test_latents_keep_the_times_of_a_variable_rate(tmp_path: Path) -> None:
    times = np.array([0, 0.1, 0.3, 0.4, 0.8, 0.9])
    with Writer(tmp_path / "pixels", description="", metadata={}) as writer:
        writer.add("train", Record(id="a", kind="dynamic", clips=(clip(6),), frames=6, height=32, width=48,
                                   frames_per_second=5 / 0.9, frame_times=times, columns={"n": 1}))  # fmt: skip
    summary = encode_all(tmp_path / "pixels", tmp_path / "latents", (32, 48), stride=2, frames=2)
    assert summary.notes == {"of a variable frame rate: build the clips with --fps for even times": 1}
    found = open_source(tmp_path / "latents", "train").read(0)
    assert found.frame_times.tolist() == [0, 0.3] and found.frames == 2 and found.columns == {"n": 1}


def test_statistics_of_latents_are_those_of_the_data_set(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """However many parts and calls encoded it."""
    build_scenes(tmp_path / "pixels", SCENES, train=4, validation=1)
    for part in (1, 2):
        execution = Execution(part=part, parts=2, jobs_per_unit=1)
        encode_all(tmp_path / "pixels", tmp_path / "latents", (24, 32), execution=execution)
    parts = [str(tmp_path / f"latents.part-{part}-of-2") for part in (1, 2)]
    assert main(["data", "merge", *parts, "--out", str(tmp_path / "latents")]) == 0
    found = json.loads((tmp_path / "latents" / "latent_statistics.json").read_text())
    moments = [record.latents.reshape(-1, 6).astype(float) for _, record in read_all(tmp_path / "latents").values()]
    mean, log_variance = np.split(np.concatenate(moments), 2, axis=-1)
    assert found["mean"] == pytest.approx(mean.mean())
    assert found["deviation"] == pytest.approx(np.sqrt((mean**2 + np.exp(log_variance)).mean() - mean.mean() ** 2))
    assert f"task.latent_shift={found['mean']:.6g}" in capsys.readouterr().out


def test_latents_record_their_encoder(tmp_path: Path) -> None:
    build_scenes(tmp_path / "pixels", SCENES, train=2, validation=0)
    encode_all(tmp_path / "pixels", tmp_path / "latents", (24, 32), digest="abc")
    assert check_latents(tmp_path / "latents", "abc")["height"] == 24
    with pytest.raises(ValueError, match="come from encoder abc, the run has xyz"):
        check_latents(tmp_path / "latents", "xyz")
    with pytest.raises(ValueError, match="has no cached latents"):
        check_latents(tmp_path / "pixels", "abc")
    with pytest.raises(BuildError, match="has latents but no pixels"):
        encode_all(tmp_path / "latents", tmp_path / "x", (24, 32))
    with pytest.raises(ValueError, match="a latent moment reaches .* but float16 ends at 65504"):
        encode_all(tmp_path / "pixels", tmp_path / "x", (24, 32), lambda f: encode_blocks(f) * 1e6)
    assert not (tmp_path / "x").exists()


def test_kept_clips_are_what_the_encoder_saw(tmp_path: Path) -> None:
    build_scenes(tmp_path / "pixels", SCENES, train=4, validation=0)
    encode_all(tmp_path / "pixels", tmp_path / "both", (16, 16), keep_clips=True)
    source = open_source(tmp_path / "both", "train")
    for row in range(4):
        record = source.read(row)
        video = decode_window(record.clips[0], range(record.frames))
        assert video.shape[1:3] == (16, 16)
        assert np.abs(encode_blocks(video) - record.latents[0].astype(np.float32)).mean() < 0.05


def test_a_killed_or_failing_build_changes_nothing(tmp_path: Path) -> None:
    build_scenes(tmp_path / "set", SCENES, train=2, validation=0)
    before = open_source(tmp_path / "set", "train").index.digest

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_scenes(tmp_path / "set", SCENES, train=3, validation=0, overwrite=True, progress=interrupt)
    assert open_source(tmp_path / "set", "train").index.digest == before
    with pytest.raises(ValueError, match="already contains a data set"):
        build_scenes(tmp_path / "set", SCENES, train=3, validation=0)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_splits_are_stable() -> None:
    names = [f"clip {n}" for n in range(200)]
    sides = dict(zip(names, assign_splits(names, 0.1), strict=True))
    assert list(sides.values()).count("validation") == 20
    more = dict(zip([*names, "new"], assign_splits([*names, "new"], 0.1), strict=True))
    assert sum(sides[name] != more[name] for name in names) <= 1
    assert assign_splits(["a", "b"], 0.001).count("validation") == 1
    assert assign_splits(["a"], 0.5) == ["train"] and assign_splits(names, 0.0).count("validation") == 0
    with pytest.raises(ValueError, match="validation = 1"):
        assign_splits(names, 1.0)


def test_parts_of_a_recording_have_one_split() -> None:
    names = [f"clip {n}" for n in range(200)]
    recordings = [f"film {n // 8}" for n in range(200)]
    splits = assign_splits(names, 0.2, recordings)
    held_out = {recording for recording, split in zip(recordings, splits, strict=True) if split == "validation"}
    assert len(held_out) == 5 and splits.count("validation") == 40
    assert assign_splits(names, 0.1, [f"film of {name}" for name in names]) == assign_splits(names, 0.1)
    assert assign_splits(names, 0.5, ["one film"] * 200) == ["train"] * 200


def test_show(tmp_path: Path) -> None:
    build_scenes(tmp_path / "set", SCENES.replace(views=2), train=6, validation=1)
    shown = show(tmp_path / "set", "train", 3)
    source = open_source(tmp_path / "set", "train")
    assert source.read(0).captions[0] in shown.text and source.index.digest in shown.text
    assert "height 24, width 32" in shown.text and "5 at 8 frames/s" in shown.text
    views = sum(source.read(row).views for row in (0, 2, 5))
    with Image.open(io.BytesIO(shown.sheet)) as sheet:
        assert sheet.format == "PNG" and sheet.height > views * 96
    with Image.open(io.BytesIO(shown.animation)) as animation:
        assert animation.format == "GIF" and animation.n_frames > 1
    encode_all(tmp_path / "set", tmp_path / "latents", (24, 32))
    assert "latents" in show(tmp_path / "latents", "train", 2).text
    with pytest.raises(ValueError, match="count = 0"):
        show(tmp_path / "set", "train", 0)
