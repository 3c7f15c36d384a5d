"""Tables with times and tar shards: builds that are killed, and in parts. On Ray: `test_ray_engine`."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jvgen.data.builders.assembly import merge_parts
from jvgen.data.builders.build_loop import Execution, Summary
from jvgen.data.builders.media import VideoOptions
from jvgen.data.builders.tables import TableColumns, build_table
from jvgen.data.builders.webdataset import build_webdataset
from jvgen.data.video_files import encode_video
from tests.unit.test_build_parts import contents
from tests.unit.test_table_builds import shard

pytestmark = pytest.mark.slow
READERS = ("table", "webdataset")
UNITS = 6  # of two jobs


def built(reader: str, folder: Path, out: Path, **execution) -> Summary:
    how = {"workers": 1, "execution": Execution(jobs_per_unit=2, **execution)}
    if reader == "table":
        columns = TableColumns(times="cut")
        return build_table(folder / "t.csv", folder / "files", out, columns, VideoOptions(validation=0), **how)
    return build_webdataset(folder / "shards", out, VideoOptions(validation=0), **how)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Path:
    """Twelve parts of three videos, and three shards of four samples."""
    root = tmp_path_factory.mktemp("recordings")
    (root / "files").mkdir()
    rows = ["path,start,end,caption"]
    for number in range(3):
        shade = np.arange(20, dtype=np.uint8)[:, None, None, None] * 4 + 40 * number
        clip = encode_video(np.broadcast_to(shade, (20, 16, 24, 3)), 10)
        (root / "files" / f"{number}.mp4").write_bytes(clip)
        rows += [f"{number}.mp4,{0.5 * part},{0.5 * part + 0.5},part {part}" for part in range(4)]
        shard(root / "shards" / f"{number}.tar", [
            item for part in range(4) for item in ((f"{part}.mp4", clip), (f"{part}.txt", f"clip {part}".encode()))
        ])  # fmt: skip
    (root / "t.csv").write_text("\n".join(rows) + "\n")
    return root


KILLED = """
import os, signal, sys
from pathlib import Path
from jvgen.data.builders import units
from tests.unit.test_interrupted_readers import built
reader, folder, out, after, part, parts = sys.argv[1:]
commit = units._commit
def counted(folder, done):
    commit(folder, done)
    if done.number == int(after):
        os.kill(os.getpid(), signal.SIGKILL)
units._commit = counted
built(reader, Path(folder), Path(out), part=int(part), parts=int(parts))
"""


@pytest.mark.parametrize("reader", READERS)
def test_killed_builds_and_parts_go_on_and_are_one_build(reader, recordings, tmp_path):
    assert built(reader, recordings, tmp_path / "whole" / "set").records == 2 * UNITS
    whole = contents(tmp_path / "whole" / "set")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def killed(out: Path, after: int, part: int = 1, parts: int = 1) -> None:
        words = map(str, (reader, recordings, out, after, part, parts))
        done = subprocess.run([sys.executable, "-c", KILLED, *words], env=environment, check=False)
        assert done.returncode == -signal.SIGKILL and not out.exists()

    killed(tmp_path / "one" / "set", 1)
    assert len(list((tmp_path / "one" / ".set.building").glob("unit-*.json"))) == 2
    built(reader, recordings, tmp_path / "one" / "set")
    assert contents(tmp_path / "one" / "set") == whole
    killed(tmp_path / "two" / "set", 1, part=2, parts=2)
    parts = [built(reader, recordings, tmp_path / "two" / "set", part=part, parts=2).out for part in (1, 2)]
    merge_parts(parts, tmp_path / "two" / "set")
    assert contents(tmp_path / "two" / "set") == whole
