"""The demo's report: what was trained, what it looks like, how it was measured, and the command behind each part."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jvgen import __version__
from jvgen.data.decode import decode_window, probe
from jvgen.data.scene_labels import COLORS, labels_of
from jvgen.data.sources import open_source
from jvgen.evaluation.motion import score
from jvgen.evaluation.report import Report
from jvgen.interop.from_torch import import_folder
from jvgen.models.image_vae import posterior
from jvgen.models.image_vae.model import ImageVAE
from jvgen.nn.network import Network
from jvgen.tasks.pixels import from_uint8, to_uint8

DIRECTIONS = ("left", "right", "toward", "away")


def write_report(workdir: Path, parts: Sequence[Mapping[str, Any]]) -> Path:
    """Write `workdir/report.html` and `workdir/measurements.json` from what the parts left there."""
    vae = json.loads((workdir / "evaluation_vae.json").read_text())["metrics"]
    video = json.loads((workdir / "evaluation_video.json").read_text())["metrics"]
    sampled, prompts = _samples(workdir / "samples")
    untrained, untrained_prompts = _samples(workdir / "samples_untrained")
    real, real_prompts = _held_out(workdir / "scenes")
    palette = {name: COLORS[name] for name in sorted({labels_of(prompt).color for prompt in prompts})}
    scores = {
        "sampled": _score(sampled, prompts, palette),
        "untrained weights": _score(untrained, untrained_prompts, palette),
        "held-out data": _score(real, real_prompts, palette),
    }
    seconds = {part["name"]: part["seconds"] for part in parts}
    measured = {"scores": scores, "image_vae": vae, "text_to_video": video, "seconds": seconds}
    (workdir / "measurements.json").write_text(json.dumps(measured, indent=1))

    report = Report(
        "jvgen demo",
        f"An image VAE and a text-to-video diffusion transformer, trained from nothing on {os.cpu_count()} CPU cores "
        f"in {sum(seconds.values()) / 60:.1f} minutes. jvgen {__version__}, jax {jax.__version__}.",
    )
    report.section("Clips from captions")
    good = scores["sampled"]
    report.text(
        f"Each clip was made from its caption alone. A classifier of plain pixels (no learned parts) finds the colour "
        f"and the direction of motion that the caption names in {good['color_accuracy']:.0%} and "
        f"{good['direction_accuracy']:.0%} of {int(good['count'])} sampled clips; "
        f"guessing would give {good['color_chance']:.0%} and "
        f"{good['direction_chance']:.0%}."
    )
    first = {prompt: number for number, prompt in reversed(list(enumerate(prompts)))}
    first_untrained = {prompt: number for number, prompt in reversed(list(enumerate(untrained_prompts)))}
    picked = list(first)[::2]
    report.clips(
        {
            "sampled": [sampled[first[prompt]] for prompt in picked],
            "untrained weights": [untrained[first_untrained[prompt]] for prompt in picked],
        },
        picked,
        scale=4,
        caption="Not selected: every second caption in order, its first clip.",
    )
    report.table(
        [
            [name, s["color_accuracy"], s["direction_accuracy"], s["both_accuracy"], s["found"], int(s["count"])]
            for name, s in scores.items()
        ],
        ["clips", "colour right", "direction right", "both right", "object found", "number"],
        caption=f"Clips that show what the caption says; chance is {good['color_chance']:.2f} for the colour and "
        f"{good['direction_chance']:.2f} for the direction. Held-out data shows how good the classifier is.",
    )
    report.contact_sheet([sampled[first[prompt]] for prompt in picked[:6]], "Sampled clips, frame by frame.", scale=3)

    report.section("Real, reconstructed, sampled")
    rows = _side_by_side(real, real_prompts, sampled, prompts)
    rebuilt = _reconstruct(workdir / "export" / "image_vae" / "vae", [clip for clip, _, _ in rows])
    report.clips(
        {
            "held-out clip": [clip for clip, _, _ in rows],
            "through the VAE": rebuilt,
            "sampled from a caption": [made for _, made, _ in rows],
        },
        [caption for _, _, caption in rows],
        scale=4,
        caption="A clip unseen in training, the same clip encoded and decoded, and one sampled for the same colour and "
        "direction.",
    )

    report.section("The image VAE")
    report.table(
        [
            ["PSNR (dB)", vae["psnr"]],
            ["SSIM", vae["ssim"]],
            ["L1 of values in [-1, 1]", vae["l1"]],
            ["L1 of the Laplacian pyramid", vae["perceptual_laplacian"]],
        ],
        ["reconstruction of held-out frames", "value"],
        caption="From the mean of the posterior, averaged weights, pixels clipped to their range.",
    )
    pairs = _visualized(workdir / "image_vae" / "samples")
    if pairs:
        report.image(
            _pairs(pairs["data"], pairs["reconstruction"]), "Held-out frames above, reconstructions below.", scale=4
        )
    rows = _rows(workdir / "image_vae")
    report.chart(rows, {"loss": "loss"}, logarithmic=True, smoothing=0.9, caption="Training loss of the VAE.")
    report.chart(rows, {"psnr": "PSNR (dB)"}, smoothing=0.9, caption="PSNR on training batches.")

    report.section("The video transformer")
    rows = _rows(workdir / "text_to_video")
    bands = [name for name in (rows[-1] if rows else {}) if name.startswith("loss_t")]
    report.chart(
        rows, {"loss": "loss"}, smoothing=0.95, caption="Training loss: squared error of the predicted velocity."
    )
    report.chart(
        rows, {name: _band(name) for name in bands}, smoothing=0.95,
        caption="The same by timestep: 0 is clean, 1000 is noise.",
    )  # fmt: skip
    report.text(f"Loss on held-out clips with averaged weights: {video['loss']:.4f}.")

    report.section("Interrupted and resumed")
    interrupted = [part for part in parts if "interrupted_by" in part]
    report.text(
        "Both runs were stopped after their first checkpoint, and the same command was given again. The curves above "
        "are of runs that were cut: a resumed run sees the batches and draws that it would have seen."
    )
    report.table(
        [
            [
                part["name"].removesuffix("_interrupted"),
                part["interrupted_by"],
                part["status"],
                _resumed(workdir, part["name"]),
            ]
            for part in interrupted
        ],
        ["run", "signal", "exit status", "after the restart"],
    )

    report.section("PyTorch")
    checked = [(name, _last_line(workdir, name)) for name in ("verify_vae", "verify_video") if name in seconds]
    if checked:
        report.text("The exported folders were loaded strictly by diffusers' own classes, and outputs compared.")
        report.table([[name, line] for name, line in checked], ["check", "result"])
    else:
        report.text("torch and diffusers are not installed here: the exports were written, not compared.")

    report.section("How it was measured")
    report.definitions(
        {
            "colour, direction": "pixels that differ from the clip's median background vote for the nearest colour "
            "of the palette; the winner's centroid and apparent size over time give the direction",
            "PSNR": "10 log10(peak^2 / mean squared error), averaged over frames",
            "SSIM": "Gaussian window of 11 pixels, deviation 1.5, averaged over channels and frames",
            "untrained weights": "the same network, sampler and captions with random weights",
        }
    )
    report.section("Commands")
    report.table([[part["name"], round(part["seconds"], 1)] for part in parts], ["part", "seconds"])
    report.code(*[part["command"] for part in parts if "interrupted_by" not in part])
    return report.write(workdir / "report.html")


def _samples(folder: Path) -> tuple[list[np.ndarray], list[str]]:
    rows = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    return [_read(folder / row["file"]) for row in rows], [row["prompt"] for row in rows]


def _read(path: Path) -> np.ndarray:
    data = path.read_bytes()
    return decode_window(data, list(range(probe(data).frames)))


def _held_out(folder: Path) -> tuple[list[np.ndarray], list[str]]:
    source = open_source(folder, "validation")
    records = [source.read(row) for row in range(len(source))]
    moving = [record for record in records if record.kind == "dynamic"]
    clips = [decode_window(record.clips[0], list(range(record.frames))) for record in moving]
    return clips, [record.captions[0] for record in moving]


def _side_by_side(
    real: Sequence[np.ndarray], real_prompts: Sequence[str], sampled: Sequence[np.ndarray], prompts: Sequence[str]
) -> list[tuple[np.ndarray, np.ndarray, str]]:
    """Held-out clips with a sampled clip of the same colour and direction, one for each direction and then others."""
    made = {
        (labels_of(prompt).color, labels_of(prompt).direction): clip
        for clip, prompt in zip(sampled, prompts, strict=True)
    }
    rows: dict[tuple[str, str | None], tuple[np.ndarray, np.ndarray, str]] = {}
    for clip, prompt in zip(real, real_prompts, strict=True):
        kind = (labels_of(prompt).color, labels_of(prompt).direction)
        if kind in made:
            rows.setdefault(kind, (clip, made[kind], prompt))
    return list(rows.values())[:6]


def _reconstruct(folder: Path, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
    config, parameters = import_folder(folder)
    network = Network.of(lambda rngs: ImageVAE(config, rngs=rngs))

    @jax.jit
    def rebuild(parameters: Any, frames: jax.Array) -> jax.Array:
        moments = network.apply(parameters, from_uint8(frames), method="encode")
        return to_uint8(network.apply(parameters, posterior.mode(moments), method="decode"))

    return [np.asarray(rebuild(parameters, clip)) for clip in clips]


def _score(clips: Sequence[np.ndarray], prompts: Sequence[str], palette: Mapping[str, tuple]) -> dict[str, float]:
    labels = [labels_of(prompt) for prompt in prompts]
    return score(clips, [(label.color, label.direction) for label in labels], palette, DIRECTIONS)


def _rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _visualized(folder: Path) -> dict[str, list[np.ndarray]]:
    steps = sorted(folder.glob("step_*"))
    if not steps:
        return {}
    found: dict[str, list[np.ndarray]] = {}
    for path in sorted(steps[-1].iterdir()):
        clip = decode_window(path.read_bytes(), [0])
        found.setdefault(path.stem.rsplit("_", 1)[0], []).append(clip[0])
    return found


def _pairs(above: Sequence[np.ndarray], below: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.concatenate(list(above), axis=1), np.concatenate(list(below), axis=1)], axis=0)


def _band(name: str) -> str:
    low, high = name.removeprefix("loss_t").split("_")
    return f"{int(low)} to {int(high)}"


def _resumed(workdir: Path, part: str) -> str:
    log = workdir / "logs" / f"{part.removesuffix('_interrupted')}.log"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("restored step")]
    return lines[0].split(" from ")[0] if lines else "started anew"


def _last_line(workdir: Path, part: str) -> str:
    lines = [
        line for line in (workdir / "logs" / f"{part}.log").read_text(errors="replace").splitlines() if line.strip()
    ]
    return lines[-1] if lines else ""
