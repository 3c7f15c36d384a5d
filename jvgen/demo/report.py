"""The demo's report: what was trained, its clips and curves, how they were measured, and the commands."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jvgen.data.scenes.labels import COLORS, labels_of
from jvgen.data.store.sources import open_source
from jvgen.data.video_files import decode_window, probe
from jvgen.demo.stages import add_stages, rows_of, subtitle
from jvgen.evaluation.motion import motion_score
from jvgen.evaluation.report import Report
from jvgen.finite import Clips, not_finite
from jvgen.interop.from_torch import import_folder
from jvgen.tasks import compatibility
from jvgen.tasks.clip_vae import ClipVAE
from jvgen.tasks.pixels import from_uint8

DIRECTIONS = ("left", "right", "toward", "away")
FRAMES_PER_SECOND = 16.0  # of the clips on the page
# Prefixes of the metrics of `jvgen evaluate --vae`, and what they measure.
CODED = {
    "": "video VAE",
    "image_decoder/": "video latents, image decoder: the frame at each latent",
    "image_latents/": "image latents of those frames, video decoder",
    "image_alone/": "image VAE alone, those frames",
}


def every_second(prompts: Sequence[str]) -> list[str]:
    """Every second caption of those that `demo_prompts` gives, each once; a color shows the directions that the one
    before it leaves out."""
    captions = list(dict.fromkeys(prompts))
    return [one for number, one in enumerate(captions) if (number + number // len(DIRECTIONS)) % 2 == 0]


def write_report(workdir: Path, parts: Sequence[Mapping[str, Any]]) -> Path:
    """Write `workdir/report.html` and `workdir/measurements.json` from the files that the parts wrote there."""
    vae = json.loads((workdir / "image_vae.json").read_text())["metrics"]
    video_vae = json.loads((workdir / "video_vae_evaluation" / "metrics.json").read_text())["metrics"]
    video = json.loads((workdir / "text_to_video.json").read_text())["metrics"]
    sampled, prompts = _samples(workdir / "samples")
    swapped, _ = _samples(workdir / "samples_swapped")
    untrained, untrained_prompts = _samples(workdir / "samples_untrained")
    real, real_prompts = _held_out(workdir / "scenes")
    palette = {name: COLORS[name] for name in sorted({labels_of(prompt).color for prompt in prompts})}
    scores = {
        "sampled": _score(sampled, prompts, palette),
        "sampled, image decoder": _score(swapped, prompts, palette),
        "untrained weights": _score(untrained, untrained_prompts, palette),
        "held-out data": _score(real, real_prompts, palette),
    }
    seconds = {part["name"]: part["seconds"] for part in parts}
    measured = {
        "scores": scores, "image_vae": vae, "video_vae": video_vae, "text_to_video": video,
        "swap": _swap(sampled, swapped), "seconds": seconds,
    }  # fmt: skip
    (workdir / "measurements.json").write_text(json.dumps(measured, indent=1))

    report = Report(
        "jvgen demo",
        subtitle(
            "An image VAE, a video VAE that shares its latents and a text-to-video diffusion transformer, trained from "
            "scratch",
            parts,
        ),
    )
    report.section("Clips from captions")
    good = scores["sampled"]
    report.text(
        f"Each clip of {len(sampled[0])} frames is generated from its caption alone. A classifier of plain pixels (no "
        f"learned parts) finds the color and the direction of motion that the caption names in "
        f"{good['color_accuracy']:.0%} and {good['direction_accuracy']:.0%} of {int(good['count'])} sampled clips; "
        f"guessing gives {good['color_chance']:.0%} and {good['direction_chance']:.0%}."
    )
    first = {prompt: number for number, prompt in reversed(list(enumerate(prompts)))}
    first_untrained = {prompt: number for number, prompt in reversed(list(enumerate(untrained_prompts)))}
    picked = every_second(prompts)
    report.clips(
        {
            "sampled": [sampled[first[prompt]] for prompt in picked],
            "untrained weights": [untrained[first_untrained[prompt]] for prompt in picked],
        },
        picked,
        frames_per_second=FRAMES_PER_SECOND,
        scale=4,
        caption="Not selected: of every color two directions, of the next one the others; a caption's first clip.",
    )
    report.table(
        [
            [name, s["color_accuracy"], s["direction_accuracy"], s["both_accuracy"], s["found"], int(s["count"])]
            for name, s in scores.items()
        ],
        ["clips", "correct color", "correct direction", "both correct", "object found", "number"],
        caption=f"Share of clips that show what the caption says; chance is {good['color_chance']:.2f} for the color, "
        f"{good['direction_chance']:.2f} for the direction. Held-out data shows the accuracy of the classifier itself.",
    )
    report.contact_sheet(
        [sampled[first[prompt]] for prompt in picked[:6]], "Sampled clips, every fourth frame.", scale=3
    )

    report.section("Two decoders of one latent space")
    group, swap = (len(sampled[0]) - 1) // (len(swapped[0]) - 1), measured["swap"]
    report.text(
        f"The diffusion model generates {len(swapped[0])} latent frames. The video VAE decodes them to "
        f"{len(sampled[0])} frames. The frozen decoder of the image VAE decodes the same latents to "
        f"{len(swapped[0])} frames, each shown here until the next. The classifier finds color and "
        f"direction in {scores['sampled, image decoder']['color_accuracy']:.0%} and "
        f"{scores['sampled, image decoder']['direction_accuracy']:.0%} of the image decoder's clips. Where both decode "
        f"a frame, the PSNR between the two is {swap['psnr']:.1f} dB.",
    )
    pairs = [first[prompt] for prompt in picked[:6]]
    repeated = {index: _repeated(swapped[index], group) for index in pairs}
    report.clips(
        {
            f"video decoder, {len(sampled[0])} frames": [sampled[index] for index in pairs],
            f"image decoder, {len(swapped[0])} frames": [repeated[index] for index in pairs],
        },
        picked[:6],
        frames_per_second=FRAMES_PER_SECOND,
        scale=4,
    )
    report.contact_sheet(
        [clip for index in pairs[:3] for clip in (sampled[index], repeated[index])],
        "Every other frame of three of them: video decoder above, image decoder below.",
        frames=len(sampled[0]) // 2 + 1,
        scale=2,
    )
    report.table(
        [
            ["video decoder", *swap["video_decoder"]],
            ["image decoder, repeated", swap["image_decoder"], *[0.0] * (group - 1)],
        ],
        ["mean change per pixel (0 to 255)", *(f"step {step + 1}" for step in range(group))],
        caption=f"Between consecutive frames, by their position among the {group} frames of a latent frame.",
    )

    report.section("Real, reconstructed, sampled")
    shown = _side_by_side(real, real_prompts, sampled, prompts)
    coded = _coded(workdir / "export", [clip for clip, _, _ in shown])
    report.clips(
        {
            "held-out clip": [clip for clip, _, _ in shown],
            "through the video VAE": coded["reconstruction"],
            "sampled from a caption": [made for _, made, _ in shown],
        },
        [caption for _, _, caption in shown],
        frames_per_second=FRAMES_PER_SECOND,
        scale=4,
        caption="A held-out clip, the same clip encoded and decoded, and a clip sampled for the same color and "
        "direction.",
    )

    report.section("The image VAE")
    report.table(
        [
            ["PSNR (dB)", vae["psnr"]],
            ["SSIM", vae["ssim"]],
            ["L1 in [-1, 1]", vae["l1"]],
            ["L1 of the Laplacian pyramid", vae["perceptual_laplacian"]],
        ],
        ["reconstruction of held-out frames", "value"],
        caption="From the mean of the posterior, with EMA weights; pixels clipped to their range.",
    )
    pairs = _visualized(workdir / "image_vae" / "samples")
    if pairs:
        report.image(
            _pairs(pairs["data"], pairs["reconstruction"]), "Held-out frames above, reconstructions below.", scale=4
        )
    rows = rows_of(workdir / "image_vae")
    report.plot(rows, {"loss": "loss"}, logarithmic=True, smoothing=0.9, caption="Training loss of the VAE.")
    report.plot(rows, {"psnr": "PSNR (dB)"}, smoothing=0.9, caption="PSNR on training batches.")

    report.section("The video VAE")
    report.text(
        "It is initialized by inflating the image VAE: at first its latents are those of the image VAE, and its "
        "decoder blends the frames between two latents. Training adds the motion in between and keeps the latents "
        "readable by the frozen image decoder."
    )
    report.table(
        [
            [name, *(video_vae[f"{prefix}{measure}"] for measure in ("psnr", "ssim", "perceptual_laplacian"))]
            for prefix, name in CODED.items()
        ],
        ["held-out clips", "PSNR (dB)", "SSIM", "Laplacian pyramid"],
        caption=f"Clips of {len(sampled[0])} frames, from posterior means with EMA weights.",
    )
    report.clips(
        {
            "held-out clip": [clip for clip, _, _ in shown[:4]],
            "video VAE": coded["reconstruction"][:4],
            "video latents, image decoder": coded["image_decoder"][:4],
            "image latents, video decoder": coded["image_latents"][:4],
        },
        [caption for _, _, caption in shown[:4]],
        frames_per_second=FRAMES_PER_SECOND,
        scale=4,
        caption="The image VAE encodes every fourth frame; the video decoder, never trained on its latents, adds the "
        "frames in between.",
    )
    curve = rows_of(workdir / "video_vae")
    report.plot(curve, {"loss": "loss"}, smoothing=0.9, caption="Training loss of the video VAE.")
    report.plot(curve, {"psnr": "PSNR (dB)"}, smoothing=0.9, caption="PSNR on training batches.")

    report.section("The video transformer")
    rows = rows_of(workdir / "text_to_video")
    bands = [name for name in (rows[-1] if rows else {}) if name.startswith("loss_t")]
    report.plot(
        rows, {"loss": "loss"}, smoothing=0.95, caption="Training loss: mean squared error of the predicted velocity."
    )
    report.plot(
        rows, {name: _band(name) for name in bands}, smoothing=0.95,
        caption="Training loss by timestep: 0 is clean, 1000 is noise.",
    )  # fmt: skip
    report.text(f"Loss on held-out clips with EMA weights: {video['loss']:.4f}.")

    report.section("Interrupted and resumed")
    interrupted = [part for part in parts if "interrupted_by" in part]
    report.text(interruptions(parts))
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
    checked = [(name, _last_line(workdir, name)) for name in ("verify_image_vae", "verify_denoiser") if name in seconds]
    if checked:
        report.text("The exported folders were loaded strictly by the classes of diffusers, and the outputs compared.")
        report.table([[name, line] for name, line in checked], ["check", "result"])
    else:
        report.text(
            "torch and diffusers are not installed: the exports were written but not compared. With them "
            "(`pip install 'jvgen[torch]'`) another start of the demo compares them and does nothing else."
        )

    report.section("Metrics")
    report.definitions(
        {
            "color, direction": "pixels that differ from the median background of the clip vote for the nearest color "
            "of the palette; the centroid and apparent size of the winner over time give the direction",
            "PSNR": "10 log10(peak^2 / mean squared error), averaged over frames",
            "SSIM": "Gaussian window of 11 pixels, standard deviation 1.5, averaged over channels and frames",
            "untrained weights": "the same network, sampler and captions with random weights",
        }
    )
    add_stages(report, parts)
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
    """Held-out clips, each with a sampled clip of the same color and direction."""
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


def _coded(folder: Path, clips: Sequence[np.ndarray]) -> dict[str, list[np.ndarray]]:
    """Clips through the video VAE and across the two VAEs; see `jvgen.tasks.compatibility.uint8_clips`.

    Raises:
      NotFinite: NaN or infinity in one of them.
    """
    (config, weights), (image_config, image_weights) = (
        import_folder(folder / name / "vae") for name in ("video_vae", "image_vae")
    )
    coder, image_coder = ClipVAE(config), ClipVAE(image_config)

    @jax.jit
    def run(weights: Any, image_weights: Any, clip: jax.Array) -> dict[str, Clips]:
        return compatibility.reconstructed_clips(coder, weights, from_uint8(clip)[None], image_coder, image_weights)

    made = [jax.device_get(run(weights, image_weights, clip)) for clip in clips]
    for name in made[0]:
        if not all(one[name].finite.all() for one in made):
            raise not_finite(f"{name} of a held-out clip", "VAEs", np.float32)
    return {name: [one[name].pixels[0] for one in made] for name in made[0]}


def _repeated(clip: np.ndarray, group: int) -> np.ndarray:
    """Each frame of the image decoder repeated until the next, to the length of the video decoder's clip."""
    return np.concatenate([clip[:1], clip[1:].repeat(group, axis=0)])


def _swap(sampled: Sequence[np.ndarray], swapped: Sequence[np.ndarray]) -> dict[str, Any]:
    """PSNR between the two decoders where both decode a frame, and the mean change between consecutive frames."""
    moving, still = np.stack(sampled).astype(np.float64), np.stack(swapped).astype(np.float64)
    group = (moving.shape[1] - 1) // (still.shape[1] - 1)
    change = np.abs(np.diff(moving, axis=1)).mean(axis=(0, 2, 3, 4)).reshape(-1, group).mean(axis=0)
    return {
        "psnr": float(10 * np.log10(255**2 / ((moving[:, ::group] - still) ** 2).mean())),
        "video_decoder": change.tolist(),
        "image_decoder": float(np.abs(np.diff(still, axis=1)).mean()),
    }


def _score(clips: Sequence[np.ndarray], prompts: Sequence[str], palette: Mapping[str, tuple]) -> dict[str, float]:
    labels = [labels_of(prompt) for prompt in prompts]
    return motion_score(clips, [(label.color, label.direction) for label in labels], palette, DIRECTIONS)


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


def interruptions(parts: Sequence[Mapping[str, Any]]) -> str:
    """What was interrupted, and which runs ended before their signal."""
    stopped = sum("interrupted_by" in part for part in parts)
    missed = [
        part["name"].removesuffix("_interrupted")
        for part in parts
        if part["name"].endswith("_interrupted") and part["status"] == 0
    ]
    text = (
        f"{stopped} runs were stopped after a checkpoint and restarted with the same command. A resumed run sees the "
        "same batches and random numbers as an uninterrupted one; the curves above are those of the resumed runs."
    )
    return text + (f" FAILED: {', '.join(missed)} ended before a signal was sent." if missed else "")


def _resumed(workdir: Path, part: str) -> str:
    log = workdir / "logs" / f"{part.removesuffix('_interrupted')}.log"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("restored step")]
    return lines[0].split(" from ")[0] if lines else "restarted from step 0"


def _last_line(workdir: Path, part: str) -> str:
    lines = [
        line for line in (workdir / "logs" / f"{part}.log").read_text(errors="replace").splitlines() if line.strip()
    ]
    return lines[-1] if lines else ""
