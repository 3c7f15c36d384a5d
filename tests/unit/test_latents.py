"""Latents in batches on all devices are those of one clip at a time; windows, sizes, and what is stale."""

import hashlib
import threading
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from jvgen.autoencoding.encoding import ClipEncoder
from jvgen.autoencoding.streaming import StreamingVAE
from jvgen.data.builders import build_folder, up_to_date
from jvgen.data.builders.assembly import append_parts
from jvgen.data.builders.batches import Separately, ToEncode, encoded
from jvgen.data.builders.build_loop import BuildJob, Execution, Team, build_dataset
from jvgen.data.builders.jobs import Corrupt, Made
from jvgen.data.builders.latents import LatentsConfig, build_latents
from jvgen.data.store.records import Record
from jvgen.data.store.sources import open_source, splits
from jvgen.data.store.writer import Writer
from jvgen.data.video_files import decode_window, encode_video
from jvgen.interop.to_torch import export_network
from jvgen.models.cogvideox_vae.config import CogVideoXVAEConfig
from jvgen.models.cv_vae.config import CVVAEConfig
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.tasks.clip_vae import ClipVAE

pytestmark = pytest.mark.usefixtures("quick_compilations")

IMAGE = ImageVAEConfig(block_channels=(4, 8), layers_per_block=1, groups=2, mid_attention=False)
PUBLISHED = CVVAEConfig.sd3().replace(
    latent_channels=4, block_channels=(4, 8), layers_per_block=1, groups=2, time_levels_down=(0,), time_levels_up=(0,),
    tile_frames=4, tile_size=8, tile_overlap=0.25,
)  # fmt: skip
COGVIDEOX = CogVideoXVAEConfig.tiny().replace(block_channels=(4, 8), groups=2, temporal_downsampling=2)
NETWORKS = {"image": IMAGE, "causal": CVVAEConfig.causal(IMAGE), "published": PUBLISHED, "cogvideox": COGVIDEOX}


class Recorder:
    """Encodes clips as the means of their frames; remembers batches, and fails when it is told to."""

    def __init__(self, size: int = 3, fail_at: int | None = None):
        self.batches: list[list[int]] = []
        self._size, self._fail_at = size, fail_at

    def batch(self, shape):
        return shape, self._size

    def begin(self, clips):
        if len(self.batches) == self._fail_at:
            raise KeyboardInterrupt
        self.batches.append([int(clip[0, 0, 0, 0]) for clip in clips])
        return [clip.mean((1, 2), keepdims=True, dtype=np.float32).repeat(2, -1) for clip in clips]

    def end(self, begun):
        return begun


def clip(number: int, frames: int = 4, size: int = 8) -> np.ndarray:
    return np.full((frames, size, size, 3), number, np.uint8)


def test_results_come_in_order_and_batches_stay_within_a_unit():
    """Clips of two lengths, a damaged one, two clips in one result; full batches of three, and the rest at a border."""
    lengths = [4, 4, 2, 4, 4, 2, 4]
    results = [
        (n // 4, ToEncode((clip(n, length),), lambda got: Made((got[0][0, 0, 0, 0],))))
        for n, length in enumerate(lengths)
    ]
    results.insert(2, (0, Corrupt("broken")))
    results.append((1, ToEncode((clip(7), clip(8)), lambda got: Made(tuple(a[0, 0, 0, 0] for a in got)))))
    encoder = Recorder()
    made = list(encoded(iter(results), encoder))
    assert made[2] == Corrupt("broken") and [m.records for m in made if m != made[2]] == [
        (0,), (1,), (2,), (3,), (4,), (5,), (6,), (7, 8)
    ]  # fmt: skip
    assert encoder.batches == [[0, 1, 3], [2], [4, 6, 7], [5], [8]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def export(name: str) -> Path:
        if name not in made:
            network = ClipVAE(NETWORKS[name]).network
            parameters = jax.jit(network.init)(jax.random.key(1))
            made[name] = export_network(NETWORKS[name], parameters, tmp_path_factory.mktemp("vae") / "vae")
        return made[name]

    return export


# Batches of the published CV-VAE are split as those of the causal one.
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "published")) for n in NETWORKS])
def test_batches_on_eight_devices_are_clips_one_by_one(name, folder):
    """Of three lengths, the longest in several chunks."""
    path = str(folder(name))
    encoder, alone = ClipEncoder(path, [(8, 8)], batch=6), StreamingVAE(path, chunk_frames=6)
    rng = np.random.default_rng(0)
    clips = [rng.integers(0, 255, (frames, 8, 8, 3), np.uint8) for frames in (5, 9, 3, 9, 5, 5)]
    groups: dict = {}
    for number, pixels in enumerate(clips):
        key, size = encoder.batch(pixels.shape)
        assert size % len(jax.devices()) == 0
        groups.setdefault(key, []).append(number)
    if name in ("image", "causal"):
        assert len(groups) < 4
    for numbers in groups.values():
        begun = encoder.begin([clips[n] for n in numbers])
        assert len(begun[0][0][0].sharding.device_set) == 8
        for number, found in zip(numbers, encoder.end(begun), strict=True):
            expected = np.concatenate(list(alone.moments(iter(clips[number]), len(clips[number]))))
            assert found.shape == expected.shape and found.dtype == np.float32
            np.testing.assert_allclose(found, expected, atol=2e-5)


def test_a_size_or_length_that_does_not_fit_is_refused(folder):
    with pytest.raises(ValueError, match="--size 8x9: both must be multiples of 2"):
        ClipEncoder(str(folder("image")), [(8, 8), (8, 9)])
    with pytest.raises(ValueError, match="a clip of 4 frames: this VAE needs 2n [+] 1"):
        ClipEncoder(str(folder("cogvideox")), [(8, 8)]).batch((4, 8, 8, 3))


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Fourteen clips of 12 frames, 16x24 or upright, whose brightness is 10 times the frame's number."""
    out = tmp_path_factory.mktemp("data") / "videos"
    with Writer(out, description="") as writer:
        for number in range(14):
            height, width = (16, 24) if number % 3 else (24, 16)
            pixels = (
                np.zeros((12, height, width, 3), np.uint8) + 10 * np.arange(12, dtype=np.uint8)[:, None, None, None]
            )
            pixels[:, :, : width // 2] += 100
            writer.add("train" if number else "validation", Record(
                id=f"{number:02d}", kind="dynamic", clips=(encode_video(pixels, 8.0),), captions=(f"clip {number}",),
                frames_per_second=8.0, frames=12, height=height, width=width, columns={"n": number},
            ))  # fmt: skip
    return out


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


SIZES = LatentsConfig(sizes=((16, 24), (24, 16)), frames=5)


def encode(videos: Path, out: Path, encoder=None, config: LatentsConfig = SIZES, digest: str = "a", **options):
    execution = Execution(**({"jobs_per_unit": 4} | options.pop("execution", {})))
    return build_latents(
        videos, out, encoder or Recorder(), config, encoder_digest=digest, workers=2, execution=execution, **options
    )


def test_windows_mirrored_and_at_the_size_of_their_aspect(videos, tmp_path):
    config = SIZES.__class__(sizes=((16, 24), (24, 16), (8, 12)), frames=5, windows=3, flips=True, keep_clips=True)
    encode(videos, tmp_path / "out", config=config)
    source = open_source(tmp_path / "out", "train")
    assert len(source) == 13 * 6 and splits(tmp_path / "out")["validation"] == 6
    records = {record.id: record for record in map(source.read, range(len(source)))}
    assert sorted(records)[:6] == [f"01/{n:04d}{end}" for n in range(3) for end in ("", "-flipped")]
    for start, name in ((0, "02/0000"), (4, "02/0001"), (7, "02/0002")):
        plain, mirrored = records[name], records[f"{name}-flipped"]
        assert (plain.height, plain.width, plain.frames, plain.captions) == (16, 24, 5, ("clip 2",))
        shown, turned = (decode_window(record.clips[0], [0])[0] for record in (plain, mirrored))
        assert abs(int(shown[8, 20, 0]) - 10 * start) < 8 and abs(int(shown[8, 4, 0]) - 10 * start - 100) < 8
        assert np.abs(turned[:, ::-1].astype(int) - shown).max() < 16
    assert (records["03/0000"].height, records["03/0000"].width) == (24, 16)
    assert source.index.columns["n"][0] == 1


def test_an_interrupted_build_goes_on_and_gives_the_same_bytes(videos, tmp_path, monkeypatch):
    monkeypatch.setattr(build_folder, "_NOTHING", -1.0)
    whole = Recorder()
    encode(videos, tmp_path / "whole" / "out", whole)
    with pytest.raises(KeyboardInterrupt):
        encode(videos, tmp_path / "out", Recorder(fail_at=6))
    kept = list((tmp_path / ".out.building").glob("unit-*.json"))
    assert kept and not (tmp_path / "out").exists()
    rest = Recorder()
    encode(videos, tmp_path / "out", rest)
    assert len(rest.batches) < len(whole.batches) and contents(tmp_path / "out") == contents(tmp_path / "whole" / "out")


def test_processes_divide_the_units(videos, tmp_path):
    encode(videos, tmp_path / "whole" / "out")
    barrier = threading.Barrier(2, timeout=60)
    encoders, summaries = (Recorder(), Recorder()), {}

    def build(index: int) -> None:
        team = Team(index, 2, lambda name: barrier.wait() and None)
        summaries[index] = encode(videos, tmp_path / "out", encoders[index], execution={"team": team})

    other = threading.Thread(target=build, args=(1,))
    other.start()
    build(0)
    other.join()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole" / "out")
    assert all(encoder.batches for encoder in encoders) and summaries[1].records < summaries[0].records == 14
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_is_there_is_kept_and_what_is_stale_refused(videos, tmp_path):
    out = tmp_path / "out"
    encode(videos, out)
    before, unused = contents(out), Recorder()
    again = encode(videos, out, unused)
    assert not unused.batches and again.records == 14 and "up to date" in str(again)
    stale = r"was made of something else: {}\. It is stale for this: pass --overwrite"
    for change, message in (
        ({"digest": "b" * 20}, "latents.encoder was a, now bbbbbbbbbbbb"),
        ({"config": LatentsConfig(sizes=SIZES.sizes, frames=5, windows=2)}, "latents.windows was None, now 2"),
    ):
        with pytest.raises(ValueError, match=stale.format(message)):
            encode(videos, out, **change)
    with pytest.raises(ValueError, match="latents.encoder was a, now c.*append to another data set"):
        encode(videos, out, digest="c", execution={"append": True})
    other = encode(videos, tmp_path / "more", digest="c", execution={"part": 1, "parts": 1 + 1}).out
    rest = encode(videos, tmp_path / "more", digest="c", execution={"part": 2, "parts": 2}).out
    with pytest.raises(ValueError, match="cannot be appended to: latents.encoder is 'a' in it and 'c' in what is"):
        append_parts(out, [other, rest])
    assert contents(out) == before
    encode(videos, out, digest="b", overwrite=True)
    assert contents(out) != before


def test_append_takes_what_is_new_of_a_source_that_has_grown_and_refuses_one_that_was_built_again(tmp_path):
    def clips(out: Path, numbers, shade: int = 0, **options) -> Path:
        jobs = [BuildJob("train", f"{n:02d}", (n, shade)) for n in numbers]
        build_dataset(out, jobs, _shaded, description="clips", metadata={"origin": "test", "options": {}}, **options)
        return out

    source, out = clips(tmp_path / "clips", range(3)), tmp_path / "out"
    adds = {"execution": {"append": True}}
    encode(source, out)
    for count in (5, 7):
        clips(source, range(count), execution=Execution(append=True))
        encode(source, out, **adds)
    assert len(open_source(out, "train")) == 7 and "up to date" in str(encode(source, out))

    def refused() -> None:
        before = contents(out)
        with pytest.raises(ValueError, match="has records of the same ids as its source, such as '00'.*--overwrite"):
            encode(source, out, **adds)
        with pytest.raises(ValueError, match="was made of something else: source_digests.train"):
            encode(source, out)
        assert contents(out) == before

    clips(source, range(9), shade=90, overwrite=True)
    refused()
    encode(source, out, overwrite=True)
    assert len(open_source(out, "train")) == 9
    # Of another source, of which it has nothing yet; then it is not what either would make.
    encode(clips(tmp_path / "others", range(20, 22)), out, **adds)
    assert len(open_source(out, "train")) == 11
    refused()


def test_no_more_of_a_large_source_is_hashed_than_may_have_been_added_to():
    """A thousand shards of ten records: it grew by the last 100, and two of the last before were not readable."""
    hashed = []

    def first(rows: slice) -> types.SimpleNamespace:
        return types.SimpleNamespace(computed_digest=lambda: hashed.append(rows.stop) or f"first {rows.stop}")

    shards = [types.SimpleNamespace(records=10)] * 1000
    index = types.SimpleNamespace(digest="all", id=[str(row) for row in range(10_000)], shards=shards, take=first)
    known = {str(row) for row in range(8985)}
    assert up_to_date._begins_with(index, "first 9000", known) and hashed == [8990, 9000]
    assert not up_to_date._begins_with(index, "others", set(index.id)) and len(hashed) == 2
    assert not up_to_date._begins_with(index, "others", {"of another source"}) and len(hashed) == 2


def _shaded(payload: tuple[int, int]) -> Record:
    number, shade = payload
    clip = encode_video(np.full((5, 16, 24, 3), 10 * number + shade, np.uint8), 8.0)
    return Record(id=f"{number:02d}", kind="dynamic", clips=(clip,), frames=5, frames_per_second=8.0, height=16,
                  width=24)  # fmt: skip


def test_a_window_needs_a_length():
    with pytest.raises(ValueError, match="windows = 2: say how long a window is"):
        LatentsConfig(sizes=((8, 8),), windows=2).validate()
    with pytest.raises(ValueError, match="1 or more each"):
        LatentsConfig(sizes=((8, 0),)).validate()
    assert Separately(np.mean).batch((1, 2, 3)) == ((1, 2, 3), 1)
