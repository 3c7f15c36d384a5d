"""The report of the multi-view demo: pairs of generated views, and how well they agree with each other and captions."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jvgen.data.scenes.labels import COLORS, labels_of
from jvgen.demo.stages import add_stages, rows_of, subtitle
from jvgen.demo.world_report import read_clip
from jvgen.evaluation.motion import classify_clip
from jvgen.evaluation.report import Report

FRAMES_PER_SECOND = 8.0


def write_report(
    workdir: Path, parts: Sequence[Mapping[str, Any]], prompts: Sequence[str], colors: Sequence[str]
) -> Path:
    """Write `workdir/report.html` and `workdir/measurements.json` from the files that the stages wrote there.

    Args:
      workdir: folder of the demo.
      parts: records of its stages.
      prompts: captions that pairs were generated from, in order.
      colors: of the scenes.
    """
    palette = {name: COLORS[name] for name in colors}
    sides = {"trained": read_pairs(workdir / "samples"), "untrained weights": read_pairs(workdir / "samples_untrained")}
    scores = {name: score(pairs, prompts, palette) for name, pairs in sides.items()}
    evaluated = json.loads((workdir / "views.json").read_text())["metrics"]
    (workdir / "measurements.json").write_text(json.dumps({"scores": scores, "evaluation": evaluated}, indent=1))
    good = scores["trained"]

    report = Report(
        "jvgen demo: two cameras", subtitle("Two views of one scene from a caption and two camera paths", parts)
    )
    report.section("Pairs of views")
    agree = good["same_color"] == 1.0 and good["named_color"] == 1.0
    report.text(
        f"Both cameras start at one place and part along a circle. A classifier of plain pixels finds the color that "
        f"the caption names in {good['named_color']:.0%} of the views (chance {1 / len(colors):.0%}), and the same "
        f"color in both views of {good['same_color']:.0%} of the pairs. "
        + ("" if agree else "FAILED pairs are marked: networks this small, trained this briefly, miss some.")
    )
    shown = sides["trained"]
    report.clips(
        {f"camera {view + 1}": [pair[view] for pair in shown] for view in range(len(shown[0]))}
        | {"camera 1, untrained weights": [pair[0] for pair in sides["untrained weights"]]},
        [_caption(pair, prompt, palette) for pair, prompt in zip(shown, prompts, strict=True)],
        frames_per_second=FRAMES_PER_SECOND,
        scale=4,
        caption="Not selected; 32x32 pixels, four times as large.",
    )
    report.table(
        [[name, s["named_color"], s["same_color"], s["first_frames"]] for name, s in scores.items()],
        ["views", "color of the caption", "same color in both", "MSE of first frames"],
        caption="First frames share a camera: they should be equal. MSE of pixels in [0, 1]; lower is better.",
    )
    report.section("Points and their lines")
    report.text("A point of one view lies on a line in the other that the cameras give. Body and line should meet.")
    for path in sorted((workdir / "samples").rglob("epipolar.png"))[:2]:
        report.image(_image(path), f"`{path.relative_to(workdir)}`: points of camera 1, and their lines in camera 2.")
    report.section("Measures of held-out scenes")
    report.table(sorted(evaluated.items()), ["measure", "value"], caption="`jvgen evaluate RUN --samples 8`.")
    report.section("Training")
    report.plot(rows_of(workdir / "single"), {"loss": "loss"}, smoothing=0.9, caption="Loss of single clips.")
    report.plot(rows_of(workdir / "views"), {"loss": "loss"}, smoothing=0.9, caption="Then loss of pairs of views.")
    add_stages(report, parts)
    return report.write(workdir / "report.html")


def read_pairs(folder: Path) -> list[list[np.ndarray]]:
    """The views of every set of a folder that `jvgen sample` wrote, in the order of the prompts."""
    rows = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    return [[read_clip(path) for path in sorted((folder / row["file"]).glob("view_*.mp4"))] for row in rows]


def score(
    pairs: Sequence[Sequence[np.ndarray]], prompts: Sequence[str], palette: Mapping[str, Any]
) -> dict[str, float]:
    """Shares of views with the caption's color and of pairs with one color, and MSE of first frames on [0, 1]."""
    named = [labels_of(prompt).color for prompt in prompts]
    seen = [[classify_clip(view, palette).color for view in pair] for pair in pairs]
    first = [np.mean((np.float64(pair[0][0]) - pair[1][0]) ** 2) / 255**2 for pair in pairs]
    return {
        "named_color": float(np.mean([c == name for colors, name in zip(seen, named, strict=True) for c in colors])),
        "same_color": float(np.mean([colors[0] is not None and len(set(colors)) == 1 for colors in seen])),
        "first_frames": float(np.mean(first)),
    }


def _caption(pair: Sequence[np.ndarray], prompt: str, palette: Mapping[str, Any]) -> str:
    seen = [classify_clip(view, palette).color or "nothing" for view in pair]
    wrong = any(color != labels_of(prompt).color for color in seen)
    return f"{prompt} (FAILED: seen are {' and '.join(seen)})" if wrong else prompt


def _image(path: Path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB"))
