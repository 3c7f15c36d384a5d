"""Building from tables and from tar shards: parts of videos, columns of published tables, bad rows and shards."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from jvgen.data.builders.assembly import merge_parts
from jvgen.data.builders.build_loop import BuildError, Execution
from jvgen.data.builders.media import VideoOptions
from jvgen.data.builders.tables import TableColumns, build_table
from jvgen.data.builders.webdataset import build_webdataset
from jvgen.data.store.records import Record
from jvgen.data.store.sources import open_source
from jvgen.data.transcoding import cut_out
from jvgen.data.video_files import DecodeError, decode_window, encode_image, encode_stream, encode_video, probe

CUT, IGNORE = TableColumns(times="cut"), TableColumns(times="ignore")


@pytest.fixture(scope="module")
def film() -> bytes:
    """Forty frames at 10 a second, whose gray level says which they are."""
    return encode_video(_gray(40), 10, keyframe_every=8, quality=1)


def _gray(count: int, first: int = 0) -> np.ndarray:
    return np.broadcast_to(
        (6 * np.arange(first, first + count, dtype=np.uint8))[:, None, None, None], (count, 16, 24, 3)
    )


def shown(clip: bytes) -> list[int]:
    """Numbers of the frames of a part of the film."""
    return np.rint(decode_window(clip, range(probe(clip).frames))[:, 4, 4, 0] / 6).astype(int).tolist()


def records_of(out: Path) -> dict[str, Record]:
    source = open_source(out, "train")
    return {record.id: record for record in (source.read(row) for row in range(len(source)))}


def built(table: Path, files: Path, columns: TableColumns | None = None, **options) -> dict[str, Record]:
    build_table(
        table, files, table.parent / "out", columns, VideoOptions(validation=0, **options), workers=1, overwrite=True
    )
    return records_of(table.parent / "out")


@pytest.mark.parametrize("form", ["mp4", "webm", "avi", "variable"])
def test_parts_have_the_frames_that_are_shown_between_their_times(film, tmp_path, form):
    """Also from the middle of the file, where decoding begins at a keyframe, and where packets have no times."""
    import av

    path = tmp_path / f"film.{'mp4' if form == 'variable' else form}"
    if form == "mp4":
        path.write_bytes(film)
    elif form == "variable":  # every second frame of the first two seconds is missing
        numbers = [*range(0, 20, 2), *range(20, 40)]
        path.write_bytes(
            encode_stream(iter(_gray(40)[numbers]), 10, times=[n / 10 for n in numbers], keyframe_every=4, quality=1)
        )
    else:
        codec = "libvpx" if form == "webm" else "mpeg4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=10)
            stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 24, 16, "yuv420p", 4_000_000
            stream.codec_context.gop_size = 8
            for frame in _gray(40):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.copy(), format="rgb24")))
            container.mux(stream.encode(None))
    for start, stop in ((0.0, 0.5), (1.7, 2.4), (2.35, 4.0), (3.9, 4.0)):
        wanted = [
            n
            for n in range(40)
            if start - 1e-9 <= n / 10 < stop - 1e-9 and (form != "variable" or n >= 20 or n % 2 == 0)
        ]
        clip = cut_out(path, start, stop)
        assert shown(clip) == wanted, (start, stop)
        if form != "variable" or start == 2.35:
            assert probe(clip).frames_per_second == pytest.approx(10)
    assert shown(cut_out(path, 1.0, 2.0, frames_per_second=5)) == [10, 12, 14, 16, 18]
    with pytest.raises(DecodeError, match="ends at 4.00 s, before 9.00 s"):
        cut_out(path, 3.0, 9.0)
    with pytest.raises(DecodeError, match="the end must be after the start"):
        cut_out(path, 2.0, 2.0)


def test_a_damaged_part_is_an_error_and_others_are_not(film, tmp_path):
    content = bytearray(film)
    place = content.index(b"mdat") + (len(film) - content.index(b"mdat")) // 2
    for number in range(40):
        content[place + 3 * number] ^= 0x5A
    outcomes = []
    for start in np.arange(0, 4, 0.5):
        try:
            outcomes.append(
                shown(cut_out(bytes(content), start, start + 0.5)) == list(range(int(10 * start), int(10 * start) + 5))
            )
        except DecodeError:
            outcomes.append(None)
    assert None in outcomes and True in outcomes and False not in outcomes


def test_columns_of_published_tables(film, tmp_path):
    """OpenVid: whole files. Koala-36M: a part of a video per row. Panda-70M: lists of parts."""
    files = tmp_path / "files"
    (files / "part1").mkdir(parents=True)
    for name in ("part1/celeb_1.mp4", "part1/celeb_2.mp4", "AAAA-aaaa_1.mp4"):
        (files / name).write_bytes(film)
    openvid = tmp_path / "OpenVid-1M.csv"
    openvid.write_text(
        "video,caption,aesthetic score,motion score,camera motion,fps,seconds\n"
        'celeb_1.mp4,"a man, smiling",5.1,2.5,pan_left,10.0,4.0\nceleb_2.mp4,a dog,4.9,,static,10.0,4.0\n'
        "celeb_3.mp4,gone,4.0,1.0,static,10.0,4.0\n"
    )
    summary = build_table(openvid, files, tmp_path / "out", options=VideoOptions(validation=0), workers=1)
    assert "1 of 3 rows have no file in" in summary.warnings[0] and "'celeb_3.mp4'" in summary.warnings[0]
    found = records_of(tmp_path / "out")
    assert list(found) == ["part1/celeb_1.mp4", "part1/celeb_2.mp4"]
    record = found["part1/celeb_1.mp4"]
    assert record.captions == ("a man, smiling",) and record.clips == (film,)
    scores = {"aesthetic_score": 5.1, "motion_score": 2.5, "camera_motion": "pan_left", "fps": 10.0, "seconds": 4.0}
    assert dict(record.columns) == scores
    assert "motion_score" not in found["part1/celeb_2.mp4"].columns

    koala = tmp_path / "Koala_36M_1.csv"
    koala.write_text(
        "videoID,url,timestamp,caption,Clarity Score\n"
        "AAAA-aaaa_1_2,https://www.youtube.com/watch?v=AAAA-aaaa_1,\"['0:00:01.000', '0:00:01.500']\",one,0.9\n"
        "AAAA-aaaa_1_7,https://www.youtube.com/watch?v=AAAA-aaaa_1,\"['0:00:03.000', '0:00:03.300']\",two,0.8\n"
    )
    found = built(koala, files, CUT)
    assert {id: (shown(r.clips[0]), r.captions, r.columns["clarity_score"]) for id, r in found.items()} == {
        "AAAA-aaaa_1.mp4/00001.000-00001.500": ([10, 11, 12, 13, 14], ("one",), 0.9),
        "AAAA-aaaa_1.mp4/00003.000-00003.300": ([30, 31, 32], ("two",), 0.8),
    }
    with pytest.raises(ValueError, match="'timestamp' has times. Pass --times cut if .* or --times ignore"):
        build_table(koala, files, tmp_path / "other")

    panda = tmp_path / "panda70m.csv"
    panda.write_text(
        "videoID,url,timestamp,caption,matching_score,desirable_filtering\n"
        "AAAA-aaaa_1,https://youtu.be/AAAA-aaaa_1,"
        "\"[['0:00:00.000', '0:00:00.300'], ['0:00:02.000', '0:00:02.200']]\",\"['it''s one', 'two, three']\","
        "\"[0.4, 0.5]\",\"['desirable', '0_low_desirable_score']\"\n".replace("''s", "s")
    )
    found = built(panda, files, CUT)
    rows = [(shown(r.clips[0]), r.captions, r.columns["matching_score"]) for r in found.values()]
    assert rows == [([0, 1, 2], ("its one",), 0.4), ([20, 21], ("two, three",), 0.5)]
    assert list(found.values())[1].columns["desirable_filtering"] == "0_low_desirable_score"


@pytest.mark.parametrize("times", ["cut", "ignore"])
def test_no_video_has_clips_in_both_splits(film, tmp_path, times):
    """Clips that are cut here, and files that were cut before, whose video is known by its URL."""
    rows = ["file,url,start,end,caption"]
    (tmp_path / "files").mkdir()
    for number in range(24):
        name = f"{number // 4}.mp4" if times == "cut" else f"{number}.mp4"
        (tmp_path / "files" / name).write_bytes(film)
        start = number % 4
        rows.append(f"{name},https://youtu.be/key{number // 4},{start},{start + 0.4},a clip of {number // 4}")
    (tmp_path / "clips.csv").write_text("\n".join(rows) + "\n")
    columns, options = TableColumns(times=times), VideoOptions(validation=0.3)
    build_table(tmp_path / "clips.csv", tmp_path / "files", tmp_path / "out", columns, options, workers=1)
    sources = [open_source(tmp_path / "out", split) for split in ("train", "validation")]
    train, validation = ({source.read(row).captions for row in range(len(source))} for source in sources)
    assert len(train) == 4 and len(validation) == 2 and not train & validation
    (tmp_path / "one.csv").write_text("\n".join(rows[:5]) + "\n")
    summary = build_table(tmp_path / "one.csv", tmp_path / "files", tmp_path / "one", columns, options, workers=1)
    assert list(summary.counts) == ["train"] and "all records are of one recording" in summary.warnings[0]


def test_columns_that_the_first_row_of_json_lines_lacks(film, tmp_path):
    (tmp_path / "files").mkdir()
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / "files" / name).write_bytes(film)
    table = tmp_path / "clips.jsonl"
    rows = [{"file": "a.mp4"}, {"file": "b.mp4", "caption": "a dog"}]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = built(table, tmp_path / "files", captions_optional=True)
    assert {id: record.captions for id, record in found.items()} == {"a.mp4": (), "b.mp4": ("a dog",)}
    rows.append({"file": "b.mp4", "caption": "a dog sleeps", "start": 1, "end": 2})
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="the column 'start' has times. Pass --times cut"):
        built(table, tmp_path / "files", captions_optional=True)


def test_tables_in_parquet_and_json_lines(film, tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    (files / "a.mp4").write_bytes(film)
    (files / "b.png").write_bytes(encode_image(_gray(1)[0].copy()))
    rows = {
        "file_name": ["a.mp4", "b.png"],
        "text": [["one", "two"], ["three"]],
        "score": [0.5, None],
        "ok": [True, False],
    }
    (tmp_path / "tables").mkdir()
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "tables" / "0.parquet")
    found = built(tmp_path / "tables" / "0.parquet", files)
    assert {id: (record.kind, record.captions) for id, record in found.items()} == {
        "a.mp4": ("dynamic", ("one", "two")), "b.png": ("image", ("three",)),
    }  # fmt: skip
    assert found["a.mp4"].columns["score"] == 0.5 and found["b.png"].columns["ok"] == 0
    table = tmp_path / "rows.jsonl"
    table.write_text(json.dumps({"path": str(files / "a.mp4"), "caption": "x", "start": 1, "end": "1.2"}) + "\n")
    assert [shown(r.clips[0]) for r in built(table, files, CUT).values()] == [[10, 11]]
    assert [r.frames for r in built(table, files, IGNORE).values()] == [40]
    table.write_text(json.dumps({"path": "b.png", "caption": "x", "start": 1, "end": 2}) + "\n")
    with pytest.raises(BuildError, match="is an image, of which the table has times"):
        built(table, files, CUT)
    # A folder of tables is one table.
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "tables" / "1.parquet")
    found = built(tmp_path / "tables", files)
    assert found["a.mp4"].captions == ("one", "two", "one", "two")


def test_bad_tables_and_rows_are_named(film, tmp_path):
    files = tmp_path / "files"
    for name in ("x/a.mp4", "y/a.mp4", "b.mp4"):
        (files / name).parent.mkdir(parents=True, exist_ok=True)
        (files / name).write_bytes(film)
    (tmp_path / "secret.mp4").write_bytes(film)
    table = tmp_path / "t.csv"

    def raises(text: str, message: str, columns: TableColumns | None = None, **options) -> None:
        table.write_text(text)
        with pytest.raises(ValueError, match=message):
            build_table(table, files, tmp_path / "out", columns, VideoOptions(**options), workers=1)

    raises(
        "path,caption\nb.mp4,x\n",
        r"t.csv: has no column 'captoin'. Did you mean caption\?",
        TableColumns(caption="captoin"),
    )
    raises("color,shape\nred,x\n", r"none of its columns \(color, shape\) is called path, file, .* \(--file-column\)")
    raises("path,caption\nb.mp4,x\n", "times = 'cut', but it has no column of times", CUT)
    raises("path,caption\nb.mp4,x,y\n", "line 2 has 3 cells, for 2 columns")
    raises("path,caption\n../secret.mp4,x\n", "contains none of the 1 files of .*'../secret.mp4'")
    raises("path,start,end,caption\nb.mp4,1,2,x\n", "already where clips begin and end", CUT, scenes="cut")
    raises('path,start,end,caption\nb.mp4,"[0, 1]",2,x\n', r"row 2: start and end: '\[0, 1\]', '2'; expected", CUT)
    raises(f"path,caption\nnone.mp4,{'x' * 200_000}\n", "contains none of the 1 files")
    raises("key,url,start,end,caption\nb,https://x/1.mp4,0,9,x\n", "ends at 4.00 s, before 9.00 s", CUT)
    with pytest.raises(ValueError, match="t.txt': a file ending in .csv"):
        (tmp_path / "t.txt").write_text("x")
        build_table(tmp_path / "t.txt", files, tmp_path / "out")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match="t.parquet cannot be read as Parquet"):
        build_table(tmp_path / "t.parquet", files, tmp_path / "out")
    table.write_text(
        "path,timestamp,caption\n"
        "a.mp4,\"['0:00', '0:01']\",x\n"
        "b.mp4,\"['0:00', '0:01', '0:02']\",x\n"
        "b.mp4,\"[['0:00', '0:01'], ['0:01', '0:02']]\",\"['a', 'b', 'c']\"\n"
        "b.mp4,\"['0:03', '0:02']\",x\n"
        'b.mp4,"[{[]: 1}]",x\n'
        "b.mp4,\"['0:00', '1:00']\",x\n"
        "b.mp4,\"['0:00', '0:01']\",fine\n"
    )
    summary = build_table(table, files, tmp_path / "out", CUT, VideoOptions(validation=0), error_budget=0.9, workers=1)
    assert summary.records == 1
    reasons = "\n".join(item.reason for item in summary.rejected)
    for reason in (
        "row 2: 'a.mp4' fits 2 files",
        "row 3: timestamp: ",
        "row 4: caption has 3 texts for 2 pairs of times",
        "its times are 3 to 2 s",
        "row 6: timestamp: '[{[]: 1}]'",
        "ends at 4.00 s, before 60.00 s",
    ):
        assert reason in reasons, reasons


# WebDataset.


def shard(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_samples_of_shards(film, tmp_path, jvgen):
    """As video2dataset and img2dataset write them; parts make the same data set."""
    meta = {"caption": "a dog", "aesthetic": 5.5, "license": "cc0", "tags": ["x"], "width": 24}
    shard(tmp_path / "in" / "00000.tar", [
        ("0000_00000.json", json.dumps(meta).encode()), ("0000_00000.mp4", film), ("0000_00000.txt", b"a dog\n"),
        ("0000_00001.mp4", film), ("0000_00001.txt", "ein Hund läuft\n".encode()),
    ])  # fmt: skip
    picture = encode_image(_gray(1, 9)[0].copy())
    shard(tmp_path / "in" / "more" / "00001.tar", [("./a.b/0001.jpg.png", b""), ("x/0002.png", picture),
          ("x/0002.json", json.dumps({**meta, "aesthetic": 1}).encode()), ("__meta__", b"{}")])  # fmt: skip
    done = jvgen("data", "build", "webdataset", tmp_path / "in", "--out", tmp_path / "out", "--validation-fraction", 0,
                 "--error-budget", 0.5)  # fmt: skip
    assert done.status == 0, done.err
    found = records_of(tmp_path / "out")
    assert {id: (record.kind, record.captions, record.frames) for id, record in found.items()} == {
        "00000/0000_00000": ("dynamic", ("a dog",), 40),
        "00000/0000_00001": ("dynamic", ("ein Hund läuft",), 40),
        "more/00001/x/0002": ("image", ("a dog",), 1),
    }
    assert found["00000/0000_00000"].clips == (film,)
    columns = found["00000/0000_00000"].columns
    assert (columns["aesthetic"], columns["license"]) == (5.5, "cc0") and "tags" not in columns
    assert found["more/00001/x/0002"].columns["aesthetic"] == 1
    parts = [
        build_webdataset(
            tmp_path / "in",
            tmp_path / "two",
            VideoOptions(validation=0),
            error_budget=0.5,
            workers=1,
            execution=Execution(part, 2, jobs_per_unit=1),
        ).out
        for part in (1, 2)
    ]
    merged = merge_parts(parts, tmp_path / "two")
    assert merged.digests["train"] == open_source(tmp_path / "out", "train").index.digest


def test_bad_shards_and_samples_are_named_and_the_others_kept(film, tmp_path):
    folder = tmp_path / "in"
    fine = [("a.mp4", film), ("a.txt", b"x"), ("a.json", b'{"score": 1, "source": "web"}')]
    cases = {
        "json": ([("b.mp4", film), ("b.txt", b"x"), ("b.json", b"{no")], "json/b.json: not JSON"),
        "type": ([("b.mp4", film), ("b.txt", b"x"), ("b.json", b'{"score": "high"}')], "field 'score' is 'high'"),
        "text": ([("b.mp4", film), ("b.txt", b"\xff")], "text/b.txt is not UTF-8 text"),
        "two": ([("b.mp4", film), ("b.webm", film), ("b.txt", b"x")], "has 2 videos or images; its files end in"),
        "none": ([("b.txt", b"x")], "has 0 videos or images"),
        "caption": ([("b.mp4", film), ("b.json", b'{"caption": {"en": "x"}}')], "field 'caption' is {'en': 'x'}; "),
        "half": ([("b.mp4", film), ("b.txt", b"x"), ("b.json", b'{"source": "\\ud800"}')], "half of a surrogate pair"),
        "latin/caf\\xe9": ([("caf\udce9.txt", b"x")], "has 0 videos or images"),
        "outside": ([("../b.mp4", film), ("../b.txt", b"x")], "../b.mp4 is a path that leads out"),
        "apart": ([("b.mp4", film), ("c.mp4", film), ("c.txt", b"x"), ("b.txt", b"x")], "of b are in several places"),
        "twice": ([("b.mp4", film), ("b.mp4", film), ("b.txt", b"x")], "twice.tar: b.mp4 is there twice"),
        "media": ([("b.mp4", film[:500]), ("b.txt", b"x")], "not a readable video or image"),
    }  # fmt: skip
    shard(folder / "0.tar", fine)
    for name, (members, _) in cases.items():
        shard(folder / f"{name.partition('/')[0]}.tar", members)
    with tarfile.open(folder / "link.tar", "w") as archive:
        link = tarfile.TarInfo("b.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    # Damages of shards of three samples; what is before them is kept.
    members = [(f"{key}.{suffix}", film if suffix == "mp4" else b"x") for key in "abc" for suffix in ("mp4", "txt")]
    whole = shard(tmp_path / "whole.tar", members).read_bytes()
    header = whole.index(b"c.mp4")
    (folder / "cut.tar").write_bytes(whole[: header + 2000])
    (folder / "noend.tar").write_bytes(whole[:header])
    (folder / "header.tar").write_bytes(whole[:header] + b"\x55" * 512 + whole[header + 512 :])
    (folder / "page.tar").write_bytes(b"<!doctype html> not found")
    (folder / "zip.tar.gz").write_bytes(b"\x1f\x8b")
    wanted = {name if "/" in name else f"{name}/": reason for name, (_, reason) in cases.items()} | {
        "link/b": "link.tar: b.mp4 is a link, which is not followed",
        "cut/(rest)": "cut.tar: damaged (unexpected end of data): what follows sample c is lost",
        "noend/(rest)": "noend.tar: truncated: it has no end mark: what follows sample b is lost",
        "header/(rest)": "header.tar: damaged at byte",
        "page": "page.tar: damaged",
        "zip.tar.gz": "zip.tar.gz is compressed: decompress it",
    }
    summary = build_webdataset(folder, tmp_path / "out", VideoOptions(validation=0), error_budget=0.9, workers=1)
    reasons = {item.name: item.reason for item in summary.rejected}
    for name, reason in wanted.items():
        assert any(key.startswith(name) and reason in text for key, text in reasons.items()), (name, reasons)
    kept = set(records_of(tmp_path / "out"))
    assert kept == {"0/a", "apart/c", "cut/a", "cut/b", "noend/a", "noend/b", "header/a", "header/b"}
    with pytest.raises(ValueError, match=r"no number or text 'scores'. Did you mean score or"):
        build_webdataset(folder, tmp_path / "other", columns=["scores"], workers=1)
    with pytest.raises(ValueError, match=r"contains no shards \(.tar\)"):
        build_webdataset(tmp_path / "out", tmp_path / "other")
    with pytest.raises(BuildError, match="files cannot be used, more than the budget"):
        build_webdataset(folder, tmp_path / "other", workers=1)
