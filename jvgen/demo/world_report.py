"""The report of the world model's demo: predictions, pushes, plans, and what was reached."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jvgen.data.video_files import decode_window, probe
from jvgen.demo.stages import add_stages, rows_of, subtitle
from jvgen.evaluation.report import Report

FRAMES_PER_SECOND = 6.0
# A pixel belongs to the cube where it is this much redder than green and blue, of 255.
REDDER = 50
# Pixels: bodies that are nearer did not follow opposite pushes.
MOVED = 1.5


def write_report(
    workdir: Path,
    parts: Sequence[Mapping[str, Any]],
    pushes: Mapping[str, tuple[float, float]],
    ways: Sequence[str],
) -> Path:
    """Write `workdir/report.html` and `workdir/measurements.json` from the files that the stages wrote there.

    Args:
      workdir: folder of the demo.
      parts: records of its stages.
      pushes: actions that the model was played with, by name.
      ways: what plans were made with.
    """
    metrics = json.loads((workdir / "world.json").read_text())["metrics"]
    played = {name: read_clip(workdir / "played" / f"{name}.mp4") for name in pushes}
    moved = {name: displacement(clip) for name, clip in played.items()}
    opposite = {
        f"{one} and {other}": followed(pushes[one], moved[one], moved[other])
        for one, other in zip(list(pushes)[::2], list(pushes)[1::2], strict=True)
    }
    plans = {way: json.loads((workdir / "plans" / way / "summary.json").read_text()) for way in ways}
    measured = {"world": metrics, "moved": moved, "opposite": opposite, "plans": plans}
    (workdir / "measurements.json").write_text(json.dumps(measured, indent=1))

    report = Report(
        "jvgen demo: a world model", subtitle("A world model of one pushed cube, trained from scratch", parts)
    )
    report.section("Plans in the model")
    report.text(
        f"A goal image says where the cube should be. At every step candidates of six actions are predicted by the "
        f"model, and the first action of the best one is taken. Within {len(_actions(workdir, ways[0]))} actions the "
        f"cube came there in {_share(plans['model'])} with the model, {_share(plans['simulator'])} with the "
        f"simulator itself in its place, {_share(plans['random'])} with random actions.",
    )
    for way in ways:
        episodes = sorted((workdir / "plans" / way).glob("episode_*.mp4"))
        states = [json.loads(path.with_suffix(".json").read_text()) for path in episodes]
        columns = "real frames, the goal" if way == "random" else "real frames, what the plan expected, the goal"
        report.clips(
            {f"{way}: {columns}": [read_clip(path) for path in episodes]},
            [
                f"episode {number + 1}: {'reached' if state['success'] else 'FAILED: not reached'}, "
                f"sum of rewards {sum(state['rewards']):.2f}"
                for number, state in enumerate(states)
            ],
            frames_per_second=FRAMES_PER_SECOND,
            scale=4,
            caption=f"32x32 pixels a frame, four times as large; {FRAMES_PER_SECOND:.0f} actions a second."
            if way == ways[-1]
            else "",
        )
    report.table(
        [[way, plan["success"], plan["return"], plan.get("plans_per_second")] for way, plan in plans.items()],
        ["plans with", "success", "mean sum of rewards", "plans per second"],
        caption=f"{plans['model']['episodes']} episodes each: enough to see that it works, too few to compare.",
    )

    report.section("Pushes")
    followed_all = all(opposite.values())
    report.text(
        "The model imagines what follows one recorded start when the cube is pushed in the same direction again and "
        "again: to the right and left of the camera, away from it (up) and toward it. "
        + ("Opposite pushes part it, each to its side." if followed_all else "FAILED: " + _not_followed(opposite))
    )
    report.clips(
        {name.replace("_", " "): [clip] for name, clip in played.items()},
        ["one start, four actions"],
        frames_per_second=FRAMES_PER_SECOND,
        scale=4,
        caption="Imagined frames after two recorded ones, four times as large.",
    )
    report.table(
        [[name.replace("_", " "), f"({push[0]:g}, {push[1]:g})", *moved[name]] for name, push in pushes.items()],
        ["played", "action", "pixels to the right", "pixels down"],
        caption="From the first to the last frame, of the middle of the red pixels; a dash where there are none.",
    )

    report.section("Predictions of held-out clips")
    better = metrics["psnr"] > metrics["psnr_copying"]
    report.table(
        [["the model", metrics["psnr"], metrics["ssim"]],
         ["repeating the last frame", metrics["psnr_copying"], metrics["ssim_copying"]]],
        ["frames after the context", "PSNR (dB)", "SSIM"],
        caption="Rollouts from two frames and the recorded actions."
        + ("" if better else " FAILED: the model is no better than a still picture."),
    )  # fmt: skip
    report.section("Training")
    report.plot(rows_of(workdir / "tokenizer"), {"loss": "loss"}, smoothing=0.9, caption="Loss of the tokenizer.")
    report.plot(rows_of(workdir / "world"), {"loss": "loss"}, smoothing=0.9, caption="Loss of the transformer.")
    add_stages(report, parts)
    return report.write(workdir / "report.html")


def read_clip(path: Path) -> np.ndarray:
    """All frames of a video file, uint8 `F H W 3`."""
    data = path.read_bytes()
    return decode_window(data, list(range(probe(data).frames)))


def displacement(clip: np.ndarray) -> tuple[float | None, float | None]:
    """Pixels to the right and down that the red body of a uint8 `F H W 3` clip moves; None where it is not seen."""
    first, last = (_middle(frame) for frame in (clip[0], clip[-1]))
    if first is None or last is None:
        return None, None
    return float(last[1] - first[1]), float(last[0] - first[0])


def followed(push: Sequence[float], one: Sequence[float | None], other: Sequence[float | None]) -> bool:
    """Whether a push and its opposite part the body by more than `MOVED` pixels, each to its side.

    Args:
      push: an action along one axis, the camera's right or the direction that it looks in, which is up in a frame.
      one: displacement that follows it; see `displacement`.
      other: displacement that follows its opposite.
    """
    if None in one or None in other:
        return False
    axis, side = (0, push[0]) if push[0] else (1, -push[1])
    to, fro = side * one[axis], side * other[axis]
    return to > 0 > fro and to - fro > MOVED


def _middle(frame: np.ndarray) -> np.ndarray | None:
    red = frame.astype(np.int32)
    places = np.argwhere(red[..., 0] - np.maximum(red[..., 1], red[..., 2]) > REDDER)
    return places.mean(axis=0) if len(places) else None


def _actions(workdir: Path, way: str) -> list:
    return json.loads((workdir / "plans" / way / "episode_000.json").read_text())["actions"]


def _share(plan: Mapping[str, float]) -> str:
    return f"{round(plan['success'] * plan['episodes'])} of {int(plan['episodes'])} episodes"


def _not_followed(opposite: Mapping[str, bool]) -> str:
    names = [name.replace("_", " ") for name, right in opposite.items() if not right]
    return f"{'; '.join(names)} do not part it, each to its side."
