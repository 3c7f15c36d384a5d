"""Growth of RepVideo-2B's step, as compiled: chips at a clip per two, frames, size; memory, bytes and time.

Beside each compiled number stands what a formula says: the state divided over all devices and what the layers save;
parameters gathered twice and gradients scattered once per step, keys and values around the ring twice and their
gradients once; attention that grows with the square of the rows and everything else with the rows. Times are `jvgen
estimate`'s.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from jvgen import config as configuration
from jvgen.nn.embeddings import token_grid
from jvgen.parallel.pods import pod_named
from tests.benchmarks.machine import Settings
from tests.benchmarks.report import Result
from tests.benchmarks.step_memory_tpu import QUICK

ROOT = Path(__file__).parents[2]
CONFIG = "configs/repvideo_2b.py"
# What was compiled stays here, so that the command goes on where it stopped.
KEPT = ROOT / "build" / "growth.json"
PLOT = ROOT / "build" / "growth.png"
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Point:
    """One compiled step: slice, frames, height and width; a clip on two chips."""

    topology: str
    frames: int
    height: int
    width: int

    @property
    def name(self) -> str:
        """Such as "v5p:4x4x4 49x480x720"."""
        return f"{self.topology} {self.frames}x{self.height}x{self.width}"

    @property
    def batch(self) -> int:
        """Clips of a step."""
        return pod_named(self.topology).chips // 2


# 16, 64, 256 and 1,024 chips; then frames, then size on 64 chips.
BASE = Point("v5p:4x4x4", 49, 480, 720)
LINES = {
    "chips": [dataclasses.replace(BASE, topology=f"v5p:{shape}") for shape in ("2x2x4", "4x4x4", "4x8x8", "8x8x16")],
    "frames": [dataclasses.replace(BASE, frames=frames) for frames in (49, 97, 193)],
    "size": [BASE, dataclasses.replace(BASE, height=720, width=1280)],
}


def run(settings: Settings) -> Result:
    """Compile what is not kept yet, and draw the plot; with `quick`, two small relatives and no plot."""
    lines, changes = LINES, ()
    if settings.quick:
        changes = tuple(text for text in QUICK if not text.startswith("data."))
        lines = {"chips": [Point(f"v5e:{shape}", 5, 64, 64) for shape in ("2x2", "2x4")]}
    kept = json.loads(KEPT.read_text()) if KEPT.exists() and not settings.quick else {}
    rows = []
    for line, points in lines.items():
        for point in points:
            if point.name not in kept:
                kept[point.name] = _compiled(point, changes)
                if not settings.quick:
                    KEPT.parent.mkdir(exist_ok=True)
                    KEPT.write_text(json.dumps(kept, indent=1))
            rows.append({"line": line, "point": point.name, **kept[point.name], **formula(point, changes)})
    _relative(rows)
    if not settings.quick:
        draw(rows, PLOT)
    return Result(
        title=f"{CONFIG} by chips, frames and size, per device; formula: of the line's first point",
        settings={"config": CONFIG, "plot": str(PLOT)},
        rows=rows,
        notes=("GiB, sent_GiB, seconds and mfu are of the compiled step; formula_* of arithmetic.",),
    )


def _settings(point: Point, changes: tuple[str, ...]) -> list[str]:
    bucket = {"frames": point.frames, "height": point.height, "width": point.width, "batch_size": point.batch}
    return [*changes, *(f"data.buckets.0.{name}={value}" for name, value in bucket.items())]


def _compiled(point: Point, changes: tuple[str, ...]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        command = [sys.executable, "-m", "jvgen.cli", "estimate", CONFIG, "--topology", point.topology, "--json", out]
        for setting in _settings(point, changes):
            command += ["--set", setting]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if not out.exists():
            return {"problem": (done.stderr.strip().splitlines() or ["failed"])[-1][:100]}
        (bucket,) = json.loads(out.read_text())["buckets"]
    found = {
        "GiB": None if bucket["memory"] is None else bucket["total_bytes"] / GIB,
        "sent_GiB": sum(one["count"] * one["bytes"] for one in bucket["collectives"] or ()) / GIB,
    }
    if bucket["time"] is not None:
        found |= {"seconds": bucket["time"]["seconds"]["likely"], "mfu": bucket["time"]["utilization"][1]}
    return found


def formula(point: Point, changes: tuple[str, ...] = ()) -> dict[str, float]:
    """State and saved activations in GiB, GiB sent, and the FLOPs of attention and of the rest, per device."""
    experiment = configuration.override(configuration.load(ROOT / CONFIG), _settings(point, changes))
    denoiser, devices = experiment.task.denoiser, pod_named(point.topology).devices
    shape = experiment.task.latent_shape(point.frames, point.height, point.width)
    rows = denoiser.text_length + math.prod(token_grid(shape, denoiser.patch_shape))
    rows = math.ceil(rows / denoiser.token_multiple) * denoiser.token_multiple
    seq = experiment.mesh.seq
    clips = point.batch * seq / devices
    layer = denoiser.width**2 * (4 + 2 * denoiser.feed_forward_ratio) + 12 * denoiser.width * denoiser.condition_width
    parameters = denoiser.layers * layer
    activation = clips * rows * denoiser.width * 2
    # Parameters, two moments, EMA and gradients in float32; of a layer its input, the output of attention and the
    # results of its products: queries, keys, values and their output, and the feed-forward block's.
    saved = 7 + denoiser.feed_forward_ratio
    memory = parameters * 4 * 5 / devices + saved * denoiser.layers * activation / seq
    # Keys and values in both passes; their gradients, in float32 on all hops but the last.
    hops = 2 * 2 * (seq - 1) + 2 * (2 * (seq - 1) + 1)
    sent = 3 * parameters * 2 + denoiser.layers * hops * activation / seq
    attention = 3 * denoiser.layers * 4 * rows**2 * denoiser.width * clips / seq
    products = 3 * 2 * parameters * rows * clips / seq
    return {
        "formula_GiB": memory / GIB,
        "formula_sent_GiB": sent / GIB,
        "formula_TFLOP": (attention + products) / 1e12,
    }


def _relative(rows: list[dict[str, Any]]) -> None:
    """Add how much time grew over the first point of the line, and how much the FLOPs."""
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        base = first.setdefault(row["line"], row)
        row["formula_growth"] = row["formula_TFLOP"] / base["formula_TFLOP"]
        if "seconds" in row and "seconds" in base:
            row["growth"] = row["seconds"] / base["seconds"]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Memory, bytes and time of every line, compiled and by formula."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        "GiB of HBM": ("GiB", "formula_GiB"),
        "GiB sent per step": ("sent_GiB", "formula_sent_GiB"),
        "time over the first": ("growth", "formula_growth"),
    }
    lines = list(dict.fromkeys(row["line"] for row in rows))
    figure, axes = pyplot.subplots(len(panels), len(lines), figsize=(4 * len(lines), 3 * len(panels)), squeeze=False)
    for column, line in enumerate(lines):
        points = [row for row in rows if row["line"] == line]
        for axis, (title, names) in zip(axes[:, column], panels.items(), strict=True):
            for name, style in zip(names, ("o-", "x--"), strict=True):
                values = [row.get(name) or math.nan for row in points]
                axis.plot(range(len(points)), values, style, label="compiled" if style == "o-" else "formula")
            axis.set_title(f"{title}, by {line}", fontsize=9)
            axis.set_xticks(range(len(points)), [row["point"].replace(" ", "\n") for row in points], fontsize=6)
            axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
