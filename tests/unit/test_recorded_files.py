"""Folders and tables as people make them: links, hidden files, names, encodings, line breaks, rows that do not fit."""

import json
import math
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from jvgen.data.builders.build_loop import Execution
from jvgen.data.builders.captions import Row, other_columns, read_captions
from jvgen.data.builders.folders import build_videos
from jvgen.data.builders.media import VideoOptions
from jvgen.data.builders.realestate10k import build_realestate10k
from jvgen.data.builders.recorded_files import Ambiguous, Names, files_in
from jvgen.data.builders.tables import build_table
from jvgen.data.builders.webvid import build_webvid
from jvgen.data.store.sources import open_source, splits
from jvgen.data.video_files import decode_window, encode_video
from jvgen.geometry import paths
from jvgen.geometry.camera_file import CameraTrack, write_cameras
from tests.unit.test_video_faults import written

CLIP = encode_video(np.full((3, 16, 16, 3), 90, np.uint8), 8)


def folder_of(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def records_of(folder: Path) -> dict:
    sources = [open_source(folder, split) for split in splits(folder)]
    return {record.id: record for source in sources for record in map(source.read, range(len(source)))}


def captions_of(folder: Path, out: Path, **options) -> dict[str, tuple[str, ...]]:
    build_videos(folder, out, VideoOptions(captions_optional=True), workers=1, **options)
    return {id: record.captions for id, record in records_of(out).items()}


@pytest.mark.parametrize(
    ("table", "content", "expected"),
    [
        ("captions.csv", 'file,caption\na.mp4,"A red ball\nrolls left"\n', "A red ball\nrolls left"),
        ("captions.csv", "file,caption\r\na.mp4,one line\r\n", "one line"),
        ("captions.csv", "\ufefffile,caption\na.mp4,byte-order mark\n", "byte-order mark"),
        ("captions.csv", "file,caption\na.mp4,A man\u2028walks\x85on\x0bfast\n", "A man\u2028walks\x85on\x0bfast"),
        ("captions.jsonl", '{"file": "a.mp4", "caption": "A man\u2028walks\x85on"}\n', "A man\u2028walks\x85on"),
        ("captions.csv", "file,caption\n.\\a.mp4,Windows\n", "Windows"),
        ("captions.csv", "file,caption\n./a.mp4,dot\n", "dot"),
        ("a.txt", "A man\u2028walks\n", "A man\u2028walks"),
    ],
)
def test_captions_are_read_whole(tmp_path: Path, table: str, content: str, expected: str) -> None:
    folder = folder_of(tmp_path / "in", {"a.mp4": CLIP, table: content})
    assert captions_of(folder, tmp_path / "out") == {"a.mp4": (expected,)}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("file,caption\na.mp4,A man walks, then runs\n", r"line 2 has 3 cells, for 2 columns .*in double quotes"),
        ("file,caption\na.mp4\n", "line 2 has 1 cells"),
        ('file,caption\na.mp4,"A 12 inch ruler\nb.mp4,ok\nc.mp4,ok\n', "captions.csv is not a table.*line 2"),
        ('file,caption\na.mp4,"A 12" ruler"\n', "captions.csv is not a table.*line 2"),
        ("file,caption\nclip.mp4,which?\n", r"line 2: 'clip.mp4' fits 2 files: x/clip.mp4, y/clip.mp4"),
        ("file,caption\na.mp4,It\x92s\n".encode("latin1"), "captions.csv is not UTF-8 text: line 2 has the byte 0x92"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path: Path, content: str | bytes, words: str) -> None:
    files = {"a.mp4": CLIP, "x/clip.mp4": CLIP, "y/clip.mp4": CLIP, "captions.csv": content}
    with pytest.raises(ValueError, match=words):
        build_videos(folder_of(tmp_path / "in", files), tmp_path / "out", VideoOptions(captions_optional=True))
    assert not (tmp_path / "out").exists()


def test_a_row_belongs_to_one_file() -> None:
    names = Names(["clip.mp4", "y/clip.mp4", "y/one.mp4", unicodedata.normalize("NFD", "café.mp4")])
    assert names.find("clip.mp4") == "clip.mp4" and names.find("y/clip") == "y/clip.mp4"
    assert names.find("one.mp4") == names.find("one") == "y/one.mp4" and names.find("two") is None
    assert names.find(unicodedata.normalize("NFC", "café.mp4")) == unicodedata.normalize("NFD", "café.mp4")
    with pytest.raises(Ambiguous, match="'clip' fits 2 files"):
        Names(["x/clip.mp4", "y/clip.mp4"]).find("clip")


def test_a_text_file_in_another_encoding_costs_its_clip_only(tmp_path: Path) -> None:
    files = {"a.mp4": CLIP, "a.txt": b"It\x92s", "b.mp4": CLIP, "b.txt": "fine"}
    summary = build_videos(folder_of(tmp_path / "in", files), tmp_path / "out", error_budget=0.5)
    [refused] = summary.rejected
    assert refused.name == "a.mp4" and "a.txt is not UTF-8 text: line 1 has the byte 0x92" in refused.reason
    assert records_of(tmp_path / "out")["b.mp4"].captions == ("fine",)


def test_folders_are_walked_through_links_without_hidden_files(tmp_path: Path) -> None:
    folder_of(tmp_path / "elsewhere", {"b.mp4": CLIP, "b.txt": "linked"})
    files = {"a.mp4": CLIP, "a.txt": "here", "._a.mp4": b"\0\5\x16\7", ".ipynb_checkpoints/a.mp4": CLIP}
    files["lost+found/a.mp4"] = CLIP
    folder = folder_of(tmp_path / "in", files)
    (folder / "b").symlink_to(tmp_path / "elsewhere")
    (folder / "round").symlink_to(folder)
    assert [path.name for path in files_in(folder)] == ["a.mp4", "a.txt", "b.mp4", "b.txt"]
    assert captions_of(folder, tmp_path / "out") == {"a.mp4": ("here",), "b/b.mp4": ("linked",)}
    (folder / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    summary = build_videos(folder, tmp_path / "again", VideoOptions(captions_optional=True), error_budget=0.5)
    assert [item.name for item in summary.rejected] == ["gone.mp4"]
    assert "No such file" in summary.rejected[0].reason


def test_links_that_lead_to_each_other_end(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in", {"a/a.mp4": CLIP, "b/b.mp4": CLIP})
    (folder / "a" / "more").symlink_to(folder / "b")
    (folder / "b" / "more").symlink_to(folder / "a")
    found = [path.relative_to(folder).as_posix() for path in files_in(folder)]
    assert found == ["a/a.mp4", "a/more/b.mp4", "b/b.mp4", "b/more/a.mp4"]


def test_folders_that_cannot_be_listed_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, scandir = folder_of(tmp_path / "in", {"a.mp4": CLIP, "b/b.mp4": CLIP}), os.scandir

    def refused(path):
        if os.path.basename(path) == "b":
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(ValueError, match="folder '.*/in/b' cannot be listed .Permission denied., so its files would"):
        build_videos(folder, tmp_path / "out", VideoOptions(captions_optional=True))


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in", {"b.mp4": CLIP})
    (Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.mp4"))).write_bytes(CLIP)
    (Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.txt"))).write_text("latin")
    assert captions_of(folder, tmp_path / "out") == {"b.mp4": (), "caf\\xe9.mp4": ("latin",)}


def test_missing_values_of_python_tables_are_no_texts(tmp_path: Path) -> None:
    """`json.dumps` writes NaN where a table of pandas has no caption or license."""
    rows = [
        {"file": "a.mp4", "caption": "a dog", "license": "cc0"},
        {"file": "b.mp4", "caption": math.nan, "license": math.nan},
    ]
    table = "".join(json.dumps(row) + "\n" for row in rows)
    folder = folder_of(tmp_path / "in", {"a.mp4": CLIP, "b.mp4": CLIP, "captions.jsonl": table})
    build_videos(folder, tmp_path / "out", VideoOptions(captions_optional=True), workers=1)
    build_table(folder / "captions.jsonl", folder, tmp_path / "table", None, VideoOptions(captions_optional=True))
    for out in ("out", "table"):
        found = records_of(tmp_path / out)
        assert found["a.mp4"].captions == ("a dog",) and found["a.mp4"].columns == {"license": "cc0"}
        assert found["b.mp4"].captions == () and not found["b.mp4"].columns


def test_rows_that_name_no_file_are_told(tmp_path: Path) -> None:
    table = "file,caption\na.mp4,here\nb.flv,no video that is read\nc.mp4,gone\n"
    folder = folder_of(tmp_path / "in", {"a.mp4": CLIP, "b.flv": CLIP, "captions.csv": table})
    rows, files = build_videos(folder, tmp_path / "out", workers=1).warnings
    assert rows == f"2 of 3 rows of {folder / 'captions.csv'} name none of the files, such as 'b.flv'"
    assert files.startswith("only files ending in .mp4, .webm, ") and files.endswith(" which leaves out 1 .flv")


def test_other_columns_of_a_table(tmp_path: Path) -> None:
    table = 'file,caption,aesthetic,license\na.mp4,x,5.5,cc0\nb.mp4,y,,"cc-by, 4.0"\nz.mp4,gone,1,cc0\n'
    folder = folder_of(tmp_path / "in", {"a.mp4": CLIP, "b.mp4": CLIP, "captions.csv": table})
    found = read_captions(folder, [folder / "a.mp4", folder / "b.mp4"])
    assert found.columns == {
        folder / "a.mp4": {"aesthetic": 5.5, "license": "cc0"}, folder / "b.mp4": {"license": "cc-by, 4.0"},
    }  # fmt: skip
    assert found.unmatched == 1
    lines = [{"file": "a.mp4", "caption": "x", "score": 2}, {"file": "b.mp4", "caption": "y", "score": "high"}]
    folder_of(folder, {"t.jsonl": "".join(json.dumps(line) + "\n" for line in lines)})
    found = read_captions(folder, [folder / "a.mp4", folder / "b.mp4"], folder / "t.jsonl")
    assert [cells["score"] for cells in found.columns.values()] == ["2", "high"]


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (("1", " -2.5e-1 "), [1.0, -0.25]),
        (("1", "NaN"), [1.0, None]),
        (("nan", "en"), ["nan", "en"]),
        # As numbers these would be 102, 7, or rounded.
        (("10_2", "3"), ["10_2", "3"]),
        (("007", "12"), ["007", "12"]),
        (("12345678901234567", "1"), ["12345678901234567", "1"]),
        (("9007199254740992", "1"), [2.0**53, 1.0]),
        (("\u0661", "1"), ["\u0661", "1"]),
    ],
)
def test_cells_that_are_numbers(cells: tuple[str, str], expected: list) -> None:
    rows = [Row(line, {"file": "a", "x": cell}) for line, cell in enumerate(cells)]
    assert [row.get("x") for row in other_columns(rows, ("file",))] == expected


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in", {"a.mp4": CLIP, "captions.csv": "file,caption,License,license\na.mp4,x,cc0,\n"})
    with pytest.raises(ValueError, match="captions.csv: columns 'License' and 'license' are both 'license'"):
        read_captions(folder, [folder / "a.mp4"])


def test_webvid_pages(tmp_path: Path) -> None:
    clips = {name: encode_video(np.full((3, 16, 16, 3), tone, np.uint8), 8) for name, tone in (("p1", 40), ("p2", 200))}
    videos = folder_of(tmp_path / "v", {"p1/007.mp4": clips["p1"], "p2/007.mp4": clips["p2"], "p3/9.mp4": CLIP})
    table = tmp_path / "t.csv"
    table.write_text("videoid,page_dir,name\n007,p1,dark\n007,p2,light\n9,,alone\n9,,again\n")
    build_webvid(table, videos, tmp_path / "out", VideoOptions(validation=0))
    found = records_of(tmp_path / "out")
    assert {id: record.captions for id, record in found.items()} == {
        "p1/007": ("dark",), "p2/007": ("light",), "9": ("alone", "again"),
    }  # fmt: skip
    assert abs(int(decode_window(found["p1/007"].clips[0], [0]).mean()) - 40) < 3
    table.write_text("videoid,name\n007,which?\n9,alone\n")
    summary = build_webvid(table, videos, tmp_path / "some", VideoOptions(validation=0), error_budget=0.5)
    assert [item.name for item in summary.rejected] == ["007"] and "fits 2 files" in summary.rejected[0].reason


def test_realestate10k_frames_by_their_times(tmp_path: Path) -> None:
    """3 seconds at 10 a second, then 30 a second: each camera has the picture of its time."""
    times = [*range(0, 3000, 100), *(3000 + np.rint(np.arange(30) * 1000 / 30).astype(int)).tolist()]
    video = np.broadcast_to((4 * np.arange(60, dtype=np.uint8))[:, None, None, None], (60, 32, 32, 3)).copy()
    clip = written(video, "mp4", "libx264", times=times, bf="0", crf="1")
    for name in ("train/clip0", "test/clip0"):
        (tmp_path / "cameras" / name).parent.mkdir(parents=True)
        wanted = np.array([200, 2900, 3000, 3100, 3500]) * 1000
        track = CameraTrack("https://www.youtube.com/watch?v=KEY", wanted, np.tile([0.5, 0.5, 0.5, 0.5], (5, 1)),
                            paths.named_paths("circle", 4, 5)[0])  # fmt: skip
        write_cameras(tmp_path / "cameras" / f"{name}.txt", track)
    media = folder_of(tmp_path / "media", {"KEY.mp4": clip})
    build_realestate10k(tmp_path / "cameras", media, tmp_path / "out", validation=0)
    found = records_of(tmp_path / "out")
    assert set(found) == {"train/clip0", "test/clip0"}
    shown = decode_window(found["test/clip0"].clips[0], range(5))[..., 0].mean(axis=(1, 2)) / 4
    assert np.rint(shown).tolist() == [2, 29, 30, 33, 45]
    write_cameras(tmp_path / "cameras" / "train" / "clip1.txt", track)
    build_realestate10k(tmp_path / "cameras", media, tmp_path / "out", validation=0, execution=Execution(append=True))
    assert set(records_of(tmp_path / "out")) == {"train/clip0", "test/clip0", "clip1"}
    folder_of(media, {"copy/KEY.mp4": clip})
    with pytest.raises(ValueError, match="KEY.mp4 and .*KEY.mp4 have its name; keep one"):
        build_realestate10k(tmp_path / "cameras", media, tmp_path / "b")
