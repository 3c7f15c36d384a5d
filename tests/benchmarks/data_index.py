"""Opening the index of a large data set: mapped columns against the single file of 0.1.0, each in its own process."""

import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np

from jvgen.data.store.index import COLUMNS, Index
from jvgen.data.store.index_files import draft_index
from jvgen.data.store.strings import Strings, Text
from tests.benchmarks.machine import Settings
from tests.benchmarks.report import Result

ROWS, QUICK_ROWS = 10_000_000, 20_000
PIECE = 500_000
ID = "{:039d}"

# What 0.1.0 did: read all columns, hash them, and send them to every worker.
BEFORE = """
    columns = {}
    with np.load(folder + "/index-train.npz") as stored:
        for name in stored.files:
            columns[name] = stored[name]
    state = hashlib.sha256()
    for name, column in columns.items():
        state.update("\\0".join(column.tolist()).encode() if name == "id" else column.tobytes())
    measured("open")
    sent(lambda file: pickle.dump(columns, file, protocol=5))
"""
AFTER = """
    from jvgen.data.store.index_files import load_index, verify_index
    from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
    from jvgen.data.stream.plan import Plan
    base = memory("RssAnon")
    measured("import")
    index = load_index(folder, "train")
    measured("open")
    verify_index(index)
    measured("verify")
    def plan(where):
        size = {"height": 256, "width": 256}
        buckets = BucketConfig(frames=17, batch_size=8, **size), BucketConfig(frames=1, batch_size=64, **size)
        return Plan(DataConfig(sources=(SourceConfig(path="x", where=where),), buckets=buckets), [index], seed=0)
    everything = plan(None)
    measured("plan")
    sent(lambda file: pickle.dump(everything, file, protocol=5))
    filtered = plan("aesthetic > 5 and license in ('cc-by', 'cc0')")
    measured("plan_where")
    start = time.perf_counter()
    for step in range(1000):
        filtered.at(10**9 + 7919 * step)
    results["step_us"] = 1e3 * (time.perf_counter() - start)
    sent(lambda file: pickle.dump(filtered, file, protocol=5), "sent_where")
"""
PROGRAM = """
    import hashlib, io, json, pickle, resource, sys, time
    import numpy as np
    folder, results, start = sys.argv[1], {}, time.perf_counter()
    class Counter(io.RawIOBase):
        size = 0
        def writable(self):
            return True
        def write(self, data):
            self.size += memoryview(data).nbytes
            return memoryview(data).nbytes
    def memory(name):
        text = open("/proc/self/status").read()
        return int(text.split(name + ":")[1].split()[0]) / 1024
    base = memory("RssAnon")
    def measured(name):
        global start
        results[name + "_s"] = time.perf_counter() - start
        results[name + "_mib"] = memory("RssAnon") - base
        start = time.perf_counter()
    def sent(dump, name="sent"):
        counter = Counter()
        dump(counter)
        results[name + "_mib"] = counter.size / 2**20
"""
LAST = """
    results["peak_mib"] = memory("VmHWM")
    print(json.dumps(results))
"""


def pieces(rows: int):
    """Indices of consecutive rows, as a web-scale data set has them."""
    for start in range(0, rows, PIECE):
        count = min(PIECE, rows - start)
        rng = np.random.default_rng(start)
        size = rng.choice(np.array([[256, 456], [480, 854], [720, 1280]]), count)
        yield Index(
            id=Strings.of(ID.format(n) for n in range(start, start + count)),
            kind=np.full(count, 2),
            frames=rng.integers(8, 400, count),
            height=size[:, 0],
            width=size[:, 1],
            views=np.ones(count),
            frames_per_second=rng.choice(np.array([24, 25, 30], np.float32), count),
            has_camera=np.zeros(count),
            has_action=np.zeros(count),
            captions=np.ones(count),
            latent_frames=np.zeros(count),
            checksum=rng.integers(0, 2**63, count),
            columns={
                "aesthetic": rng.normal(5, 1, count),
                "license": Text(rng.integers(0, 3, count).astype(np.int32), Strings.of(["all-rights", "cc-by", "cc0"])),
            },
        )


def write_before(folder: Path, rows: int) -> None:
    """The same rows in the file of 0.1.0."""
    parts = {name: [] for name in COLUMNS}
    for piece in pieces(rows):
        for name in COLUMNS:
            parts[name].append(np.array(piece.id.tolist()) if name == "id" else np.array(getattr(piece, name)))
    np.savez(folder / "index-train.npz", **{name: np.concatenate(part) for name, part in parts.items()})


def measure(program: str, folder: Path) -> dict[str, float]:
    """Run a program in a fresh process, whose files are in the page cache."""
    code = textwrap.dedent(PROGRAM) + textwrap.dedent(program) + textwrap.dedent(LAST)
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], check=True, capture_output=True, text=True, env={**os.environ}
    )
    return json.loads(done.stdout.splitlines()[-1])


def run(settings: Settings) -> Result:
    """One data set of each format, measured several times; the median is shown."""
    rows = QUICK_ROWS if settings.quick else ROWS
    results, samples = [], {}
    for name, program in (("mapped columns", AFTER), ("0.1.0", BEFORE)):
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as text:
            folder = Path(text)
            if program is AFTER:
                draft_index(folder, "train", pieces(rows), ()).commit()
            else:
                write_before(folder, rows)
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            measured = [measure(program, folder) for _ in range(2 if settings.quick else 3)]
        samples[name] = measured
        row = {key: float(np.median([one[key] for one in measured])) for key in measured[0]}
        results.append({"index": name, "rows": rows, "disk_gb": size / 1e9, **row})
    return Result(
        title="Opening an index: seconds and MiB of private memory; sent: MiB pickled to each worker",
        settings={"rows": rows},
        rows=results,
        shown=(
            "index", "rows", "disk_gb", "open_s", "open_mib", "verify_s", "plan_s", "plan_mib", "sent_mib",
            "plan_where_s", "sent_where_mib", "step_us", "peak_mib",
        ),
        samples=samples,
        notes=(
            "plan: two buckets over all records; plan_where: with a filter on two columns. step_us: looking up the",
            "rows of a batch at any step. Files are in the page cache; mapped pages are shared, not private.",
        ),
    )  # fmt: skip
