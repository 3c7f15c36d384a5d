"""Scores of clips, statistics and verification of data sets, through their commands."""

import io
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from jvgen.cli import data as data_command
from jvgen.cli.main import main
from jvgen.data.builders import scores
from jvgen.data.builders.near_duplicates import MAX_BITS, near_duplicates
from jvgen.data.builders.scores import perceptual_hash, score
from jvgen.data.store.index_files import set_columns
from jvgen.data.store.records import Record
from jvgen.data.store.sources import open_source
from jvgen.data.store.statistics import distributions, of_numbers, of_texts
from jvgen.data.store.strings import Text
from jvgen.data.store.writer import Writer
from jvgen.data.video_files import encode_image, encode_video
from jvgen.runs.data_statistics import data_statistics
from jvgen.training.experiment import load_experiment

RATE = 8.0
SAVED = Path(__file__).parents[1] / "resume" / "saved_by_0_1_0" / "files.tar.xz"


def texture(seed: int, blur: float = 0.0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 255, (75, 100, 3), np.uint8)
    wide = cv2.resize(coarse, (400, 300), interpolation=cv2.INTER_CUBIC)
    return cv2.GaussianBlur(wide, (0, 0), blur) if blur else wide


def moving(seed: int, step: int, *, blur: float = 0.0, size: tuple[int, int] = (128, 96), quality: int = 18) -> bytes:
    """A window that moves by `step` of 96 pixels a frame."""
    wide, frames = texture(seed, blur), []
    for n in range(12):
        frame = wide[20 : 20 + 96, 20 + step * n : 148 + step * n]
        frames.append(cv2.resize(frame, size, interpolation=cv2.INTER_AREA) if size != (128, 96) else frame)
    return encode_video(np.stack(frames), RATE, quality=quality)


def record(name: str, clip: bytes, width: int = 128, height: int = 96, **changes) -> Record:
    return Record(
        id=name, kind="dynamic", clips=(clip,), frames=12, height=height, width=width, frames_per_second=RATE
    ).replace(**changes)  # fmt: skip


def test_motion_is_by_the_times_of_frames(tmp_path: Path) -> None:
    """A last frame that is shown for long does not make the others slow."""
    times = np.array([*(np.arange(11) / RATE), 100.0])
    with Writer(tmp_path / "set", description="clips", metadata={}) as writer:
        writer.add("train", record("even", moving(1, 2)))
        writer.add("train", record("varies", moving(1, 2), frames_per_second=11 / 100, frame_times=times))
    score(tmp_path / "set", scores=["motion"])
    even, varies = open_source(tmp_path / "set", "train").index.columns["motion"].tolist()
    assert even == pytest.approx(2 / 96 * RATE, rel=0.1) and varies == pytest.approx(even * 5 / 6, rel=0.1)


@pytest.fixture()
def data(tmp_path: Path) -> Path:
    still = encode_image(texture(5)[:96, :128])
    with Writer(tmp_path / "set", description="clips", metadata={}, shard_bytes=50_000) as writer:
        for one in (
            record("still", moving(1, 0)),
            record("slow", moving(1, 2)),
            record("fast", moving(2, 6)),
            record("blurred", moving(3, 2, blur=6.0)),
            record("smaller copy of fast", moving(2, 6, size=(64, 48), quality=30), 64, 48),
            record("damaged", b"not a clip"),
            Record(id="image", kind="image", clips=(still,), height=96, width=128),
            record("copy of slow", moving(1, 2, quality=28)),
        ):
            writer.add(
                "train", one.replace(columns={"license": "cc0" if "copy" in one.id else "cc-by", "n": len(one.id)})
            )
    return tmp_path / "set"


def test_scores(data: Path) -> None:
    before = open_source(data, "train").index.digest
    done = []
    result = score(data, progress=lambda n, total: done.append((n, total)))
    assert result.columns == ("motion", "sharpness", "duplicate_of") and result.unreadable == ("damaged",)
    assert done == [(8, 8)] and result.duplicates == 2
    index = open_source(data, "train").index
    rows = {name: row for row, name in enumerate(index.id)}
    assert index.digest == before and not list((data / "index-train").glob(".scores*"))
    motion = {name: index.columns["motion"][row] for name, row in rows.items()}
    # Pixels a frame, in shorter sides a second.
    assert motion["still"] < 0.01
    assert motion["slow"] == pytest.approx(2 / 96 * RATE, rel=0.15)
    assert motion["fast"] == pytest.approx(6 / 96 * RATE, rel=0.25)
    assert np.isnan(motion["image"]) and np.isnan(motion["damaged"])
    sharpness = {name: index.columns["sharpness"][row] for name, row in rows.items()}
    assert sharpness["blurred"] < 0.2 * sharpness["slow"] and np.isnan(sharpness["damaged"]) and sharpness["image"] > 0
    assert index.columns["duplicate_of"].tolist() == [
        {"smaller copy of fast": "fast", "copy of slow": "slow"}.get(name, "") for name in index.id
    ]
    assert index.columns["license"].counts() == {"cc-by": 6, "cc0": 2}


def test_a_killed_call_goes_on(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was scored before is not scored again, and processes give the same columns."""
    monkeypatch.setattr(scores, "_CHUNK", 3)
    whole = score(data)
    columns = dict(open_source(data, "train").index.columns)
    real, calls = scores._scored, []

    def failing(folder: str, split: str, rows: range):
        calls.append(rows.start)
        if rows.start == 6 and len(calls) < 4:
            raise KeyboardInterrupt
        return real(folder, split, rows)

    monkeypatch.setattr(scores, "_scored", failing)
    with pytest.raises(KeyboardInterrupt):
        score(data)
    assert score(data) == whole and calls == [0, 3, 6, 6]
    monkeypatch.setattr(scores, "_scored", real)
    set_columns(data, "train", {name: np.full(8, np.nan) for name in ("motion", "sharpness")})
    assert score(data, workers=2) == whole, "processes"
    again = open_source(data, "train").index.columns
    assert all(list(again[name]) == pytest.approx(list(columns[name]), nan_ok=True) for name in ("motion", "sharpness"))
    with pytest.raises(ValueError, match="scores = .'aesthetic',.: some of motion, sharpness, duplicates"):
        score(data, scores=("aesthetic",))


def test_a_data_set_of_0_1_0_is_refused_before_it_is_scored(tmp_path: Path) -> None:
    shutil.unpack_archive(SAVED, tmp_path, filter="data")
    folder = next((tmp_path / "data").iterdir())
    with pytest.raises(ValueError, match="index is of 0.1.0; run `jvgen data upgrade"):
        score(folder)


def test_near_duplicates_are_found_as_by_comparing_all() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, (300, 3)).astype(np.uint64)
    for row in range(150, 300):  # near another one, at up to 20 bits
        hashes[row] = hashes[rng.integers(0, row)]
        for bit in rng.choice(192, rng.integers(0, 21), replace=False):
            hashes[row, bit // 64] ^= np.uint64(1) << np.uint64(bit % 64)
    readable = rng.random(300) > 0.05
    root = np.arange(300)
    for row in range(300):
        for other in range(row):
            if readable[row] and readable[other] and np.bitwise_count(hashes[row] ^ hashes[other]).sum() <= MAX_BITS:
                root[row] = min(root[row], root[other])
    while not np.array_equal(root[root], root):
        root = root[root]
    found = near_duplicates(hashes, readable)
    assert found.tolist() == [-1 if first == row else first for row, first in enumerate(root.tolist())]
    assert np.all(found[~readable] == -1) and np.all(found < np.arange(300)) and np.all(found[found[found >= 0]] == -1)
    frame = texture(7)
    other = cv2.resize(frame, (133, 100), interpolation=cv2.INTER_AREA)
    assert (perceptual_hash(frame) ^ perceptual_hash(other)).bit_count() <= 3
    assert (perceptual_hash(frame) ^ perceptual_hash(texture(8))).bit_count() > 16


def test_near_duplicates_among_clips_that_begin_alike() -> None:
    """Thousands of clips with a black first frame, and thousands that are one still frame."""
    rng = np.random.default_rng(1)
    black = rng.integers(0, 2**63, (6000, 3)).astype(np.uint64)
    black[:, 0] = 0
    still = np.repeat(rng.integers(0, 2**63, (3000, 1)).astype(np.uint64), 3, axis=1)
    flipped = np.bitwise_xor.reduce(np.uint64(1) << rng.integers(0, 64, (6000, MAX_BITS)).astype(np.uint64), axis=1)
    copies = black.copy()
    copies[:, 2] ^= flipped
    found = near_duplicates(np.concatenate([black, still, copies, still]), np.ones(18_000, bool))
    assert found.tolist() == [-1] * 9000 + list(range(6000)) + list(range(6000, 9000))


def test_statistics(data: Path) -> None:
    found = {one.name: one for one in distributions(open_source(data, "train").index)}
    assert found["kind"].labels == ("dynamic", "image") and found["kind"].counts == (7, 1)
    assert found["frame size"].counts == (7, 1) and found["frame size"].labels == ("128x96", "64x48")
    assert found["n"].quantiles[0] == 4 and sum(found["n"].counts) == 8 and found["license"].missing == 0
    assert "views" not in found and "duration (s)" not in found, "columns in which all are alike say nothing"
    one = of_numbers("x", np.array([*np.linspace(0, 1, 1000), 1e6, np.nan]))
    assert one.missing == 1 and sum(one.counts) == 1001 and one.edges[-1] < 3 and one.quantiles[-1] == 1e6
    assert of_numbers("x", np.full(3, np.nan)).counts == ()
    texts = of_texts("x", Text.of([f"{n % 20:02d}" for n in range(100)] + [""]))
    assert len(texts.labels) == 13 and texts.labels[-1] == "8 others" and texts.counts[-1] == 40 and texts.missing == 1


def test_the_commands(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    assert data_command.SCORES == scores.SCORES
    assert main(["data", "score", str(data), "--scores", "sharpness", "duplicates"]) == 0
    out = capsys.readouterr().out
    assert "8 records have columns sharpness, duplicate_of" in out and "2 are near-duplicates" in out
    assert "1 cannot be decoded and have none: damaged" in out
    picture = tmp_path / "stats.png"
    assert main(["data", "stats", str(data), "--out", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "8 records" in out and "cc-by" in out and "75.0%" in out and "sharpness" in out and "motion" not in out
    assert min(Image.open(io.BytesIO(picture.read_bytes())).size) > 400
    assert main(["data", "stats", str(data), "--where", "license == 'cc0'"]) == 0
    assert "2 records of 8, license == 'cc0'" in capsys.readouterr().out.replace("\n", " ")
    assert main(["data", "stats", str(data), "--where", "licens == 'cc0'"]) == 2
    assert "no column 'licens'. Did you mean license" in capsys.readouterr().err
    assert main(["data", "verify", str(data)]) == 0
    assert "train: 8 of 8 records are what was written" in capsys.readouterr().out


def test_records_and_tokens_of_the_buckets_of_a_config(data: Path, capsys: pytest.CaptureFixture) -> None:
    config = Path(__file__).parents[2] / "configs" / "demo_text_to_video.py"
    experiment = load_experiment(config, [])
    [bucket] = experiment.data.buckets
    assert main(["data", "stats", str(data), "--config", str(config)]) == 0
    assert f"1x{bucket.frames}x32x32" in capsys.readouterr().out
    # Of one shape, at different strides: 12 frames are too few for the second.
    buckets = bucket.replace(frames=9), bucket.replace(frames=9, strides=(2,)), bucket.replace(frames=5)
    experiment = experiment.replace(data=experiment.data.replace(buckets=buckets))
    records, tokens = data_statistics(data, "train", "n < 6", experiment).distributions[-2:]
    of_name = dict(zip(records.labels, records.counts, strict=True))
    assert of_name == {"1x9x32x32 (buckets.0)": 3, "1x9x32x32 (buckets.1)": 0, "1x5x32x32": 3}
    per_record = [experiment.task.build().sequence_length(one) for one in buckets]
    assert tokens.counts == (3 * per_record[0], 0, 3 * per_record[2])


def test_a_damaged_record_is_found(data: Path, capsys: pytest.CaptureFixture) -> None:
    shard = sorted(data.glob("*array_record*"))[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    shard.write_bytes(bytes(content))
    assert main(["data", "verify", str(data), "--threads", "2"]) == 1
    out = capsys.readouterr().out
    assert "is corrupt" in out and "records are what was written" in out and "8 of 8" not in out
    os.unlink(shard)
    assert main(["data", "verify", str(data)]) == 1
