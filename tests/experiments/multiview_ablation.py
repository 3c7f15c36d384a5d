"""CVD's ablation at the scale of the demo: synchronization, epipolar bias and kinds of data, over several seeds.

    make demo
    python -m tests.experiments.multiview_ablation --demo runs/demo --workdir runs/multiview --out multiview.md

Builds scenes (static ones with a moving camera, dynamic ones) and their latents. Trains a transformer on single clips
with cameras once; then, with the transformer frozen as in the paper, the modules of every variant, with equal data,
steps and seeds. Evaluates pairs of views generated from held-out captions and cameras: MSE of first frames, which share
a camera, and of views with the same trajectory; distance of the body from the epipolar line of its position in the
other view; motion as named in the caption, and equal in both views. Finished runs are not trained again.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from jvgen import config as configuration
from jvgen.autoencoding.encoding import ClipEncoder
from jvgen.autoencoding.latent_statistics import write_latent_statistics
from jvgen.data.builders.latents import LatentsConfig, build_latents
from jvgen.data.builders.scenes import build_scenes
from jvgen.data.scenes.labels import COLORS, labels_of
from jvgen.data.scenes.scenes import SceneConfig
from jvgen.data.store.sources import open_source
from jvgen.data.stream.pairs import folded
from jvgen.data.stream.plan import ClipSpec
from jvgen.data.stream.transforms import load_example
from jvgen.demo.report import DIRECTIONS
from jvgen.evaluation.camera_pose import PoseScore, pose_errors_across_views, sift, views_mse
from jvgen.evaluation.contact_sheets import contact_sheet, png_bytes
from jvgen.evaluation.motion import classify_clip
from jvgen.geometry.cameras import Cameras, relative
from jvgen.geometry.epipolar import fundamental_matrices
from jvgen.interop.digest import content_digest
from jvgen.models.multiview.synchronization import SyncMode
from jvgen.runs.evaluation import evaluate_run
from jvgen.runs.exporting import export_run
from jvgen.runs.inference import open_run
from jvgen.tasks.task import SampleRequest
from jvgen.training.experiment import Experiment
from jvgen.training.loop import train

CONFIG = Path(__file__).parents[2] / "configs" / "demo_multiview.py"
NONE, FULL = "no synchronization", "full"
VARIANTS = (NONE, "no epipolar bias", "static only", "no homography", FULL)
MORE_VARIANTS = ("joint attention", "one layer")
PALETTE = {name: COLORS[name] for name in ("red", "yellow", "green", "blue", "purple", "cyan")}
ENLARGED = 256  # pixels along a side of what matches are looked for in
# The clips that the demo's autoencoder knows; 15 frames fold into two views of 8.
SCENES = SceneConfig(
    frames=15, kinds={"static": 0.7, "dynamic": 0.3}, background="plain", wander=0.0, colors=tuple(PALETTE),
    shapes=("ball", "cube"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all runs have in common."""

    latents: Path
    vae: Path
    workdir: Path
    base_steps: int
    steps: int
    seeds: tuple[int, ...]
    pairs: int
    batches: int
    sets: tuple[str, ...] = ()

    @property
    def base(self) -> Path:
        """The run of the frozen transformer."""
        return self.workdir / f"base_{self.base_steps}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, train, measure, write the table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.experiments.multiview_ablation", description=__doc__)
    parser.add_argument("--demo", type=Path, required=True, help="folder that `make demo` wrote: its image VAE")
    parser.add_argument("--workdir", type=Path, required=True, help="data, and one run for every variant and seed")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write; the numbers go beside it")
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--size", type=int, default=32, help="pixels along a side")
    parser.add_argument("--base-steps", type=int, default=400, help="of the transformer, on single clips")
    parser.add_argument("--steps", type=int, default=150, help="of what each variant adds")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--variants", default=",".join(VARIANTS), help=f"with commas; also {', '.join(MORE_VARIANTS)}")
    parser.add_argument("--pairs", type=int, default=32, help="pairs of views generated a run")
    parser.add_argument("--batches", type=int, default=8, help="held-out batches")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="PATH=VALUE", help="of every run")
    chosen = parser.parse_args(arguments)
    names = chosen.variants.split(",")
    unknown = [name for name in names if name not in VARIANTS + MORE_VARIANTS]
    if unknown:
        parser.error(f"{unknown[0]!r} is no variant; they are {', '.join(VARIANTS + MORE_VARIANTS)}")
    vae = chosen.demo / "export" / "image_vae" / "vae"
    sizes = [f"data.buckets.{b}.{side}={chosen.size}" for b in (0, 1) for side in ("height", "width")]
    setting = Setting(
        latents=build_data(chosen.workdir, vae, scenes=chosen.scenes, size=chosen.size),
        vae=vae,
        workdir=chosen.workdir,
        base_steps=chosen.base_steps,
        steps=chosen.steps,
        seeds=tuple(int(seed) for seed in chosen.seeds.split(",")),
        pairs=chosen.pairs,
        batches=chosen.batches,
        sets=(*sizes, *chosen.sets),
    )
    train_base(setting)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    # Seed by seed, so that a table over all variants is there early.
    for seed in setting.seeds:
        for name in names:
            found[name].append(measure(setting, name, seed))
            chosen.out.with_suffix(".json").write_text(json.dumps(found, indent=1))
            chosen.out.write_text(report(setting, found))
    print(chosen.out.read_text())
    return 0


# Data and runs.


def build_data(workdir: Path, vae: Path, *, scenes: int, size: int) -> Path:
    """Scenes and their latents, unless they are there."""
    frames, latents = workdir / f"scenes_{scenes}_{size}", workdir / f"latents_{scenes}_{size}"
    if not frames.exists():
        config = dataclasses.replace(SCENES, height=size, width=size)
        build_scenes(frames, config, train=scenes, validation=max(scenes // 10, 64))
    if not (latents / "latent_statistics.json").exists():
        encoder = ClipEncoder(str(vae), [(size, size)])
        chosen = LatentsConfig(sizes=((size, size),), keep_clips=True)
        build_latents(frames, latents, encoder, chosen, encoder_digest=content_digest(vae), overwrite=True)
        write_latent_statistics(latents)
    return latents


def experiment(setting: Setting, name: str, seed: int, *, steps: int, base: Path | None) -> Experiment:
    """The demo's run, changed as a variant says, on the transformer exported to `base` or one of its own."""
    made: Experiment = configuration.load(CONFIG)
    of_latents = json.loads((setting.latents / "latent_statistics.json").read_text())
    task, data = made.task, made.data
    denoiser = task.denoiser
    changes = {
        NONE: None,
        "no epipolar bias": {"mode": SyncMode.CROSS},
        "joint attention": {"mode": SyncMode.JOINT},
        "one layer": {"sublayers": 1},
    }.get(name, {})
    sync = None if changes is None else denoiser.sync.replace(**changes)
    homography = task.homography.replace(strength=0.0) if name == "no homography" else task.homography
    source = data.sources[0].replace(path=str(setting.latents))
    made = made.replace(
        name=_slug(name),
        seed=seed,
        task=task.replace(
            denoiser=denoiser.replace(sync=sync),
            denoiser_weights=None if base is None else str(base / "denoiser"),
            text_encoder_weights=None if base is None else str(base / "text_encoder"),
            homography=homography,
            vae_weights=str(setting.vae),
            latent_shift=of_latents["mean"],
            latent_scale=1 / of_latents["deviation"],
        ),
        data=data.replace(sources=(source,), evaluation_sources=(source.replace(split="validation"),)),
        training=made.training.replace(steps=steps, tensorboard=False, evaluate_every=0, visualize_every=0),
        checkpoint=made.checkpoint.replace(every=max(steps, 1), keep_last=1),
    )
    made = configuration.override(made, setting.sets)
    if name == "static only":
        # The bucket of moving clips goes, and with it the records that only it takes.
        kept = made.data.sources[0].replace(kinds=("static",))
        held_out = made.data.evaluation_sources[0].replace(kinds=("static",))
        made = made.replace(
            data=made.data.replace(buckets=made.data.buckets[:1], sources=(kept,), evaluation_sources=(held_out,))
        )
    configuration.validate_tree(made)
    return made


def train_base(setting: Setting) -> None:
    """The transformer that all variants add to, trained on single clips with their cameras, and its export."""
    export = setting.base / "export"
    if export.exists():
        return
    status = train(experiment(setting, NONE, 0, steps=setting.base_steps, base=None), setting.base)
    assert status == 0, f"{setting.base} ended with status {status}"
    export_run(setting.base, export)


def measure(setting: Setting, name: str, seed: int) -> dict[str, Any]:
    """Train one run unless it is there, and what is asked about it; kept beside the run."""
    run = setting.workdir / f"{_slug(name)}_{seed}"
    kept = run / "measured.json"
    asked = {"pairs": setting.pairs, "batches": setting.batches, "steps": setting.steps, "base": setting.base_steps}
    if kept.is_file():
        before = json.loads(kept.read_text())
        if before["asked"] == asked:
            return before
    began = time.perf_counter()
    made = experiment(setting, name, seed, steps=setting.steps, base=setting.base / "export")
    status = train(made, run)
    assert status == 0, f"{run} ended with status {status}"
    row = {
        "asked": asked,
        "trained": time.perf_counter() - began,
        "evaluation": evaluate_run(run, batches=setting.batches),
        **generated(setting, run),
    }
    kept.write_text(json.dumps(row, indent=1))
    return row


def captions_of_motion(setting: Setting) -> list[str]:
    """Captions of held-out moving scenes that say which way the body goes; in turn again where there are too few."""
    source = open_source(setting.latents, "validation")
    records = (source.read(row) for row in range(len(source)))
    captions = [record.captions[0] for record in records if record.kind == "dynamic"]
    named = [caption for caption in captions if labels_of(caption).direction in DIRECTIONS]
    return [named[number % len(named)] for number in range(setting.pairs)]


def held_out(setting: Setting, frames: int, size: tuple[int, int]) -> tuple[list[str], Cameras, np.ndarray]:
    """Captions, folded cameras `B 2 F ...` and the real views `B 2 F H W 3` of held-out still scenes."""
    source = open_source(setting.latents, "validation")
    bucket = configuration.load(CONFIG).data.buckets[0].replace(frames=frames, height=size[0], width=size[1])
    sample = ClipSpec(start=0, stride=1, views=(0,), crop_y=0.5, crop_x=0.5, flip=False, caption=0)
    captions, intrinsics, extrinsics, videos = [], [], [], []
    for row in range(len(source)):
        record = source.read(row)
        if record.kind == "static" and len(captions) < setting.pairs:
            example = load_example(record, sample, bucket, "crop")
            captions.append(example["caption"])
            intrinsics.append(folded(example["intrinsics"]))
            extrinsics.append(folded(example["extrinsics"]))
            videos.append(folded(example["video"]))
    return captions, Cameras(np.stack(intrinsics), np.stack(extrinsics)), np.stack(videos)


def generated(setting: Setting, run: Path) -> dict[str, float]:
    """Measures of generated pairs, and of the real ones that their cameras are of."""
    loaded = open_run(run)
    task, parameters = loaded.task, loaded.compute_parameters()
    bucket = loaded.experiment.data.buckets[0]
    size = (bucket.height, bucket.width)
    captions, cameras, real = held_out(setting, bucket.frames, size)
    request = SampleRequest(task.config.frames_of(bucket), *size)
    batch = min(8, len(captions))

    @jax.jit
    def generate(parameters: Any, frozen: Any, tokens: jax.Array, slots: jax.Array, cameras: Cameras) -> jax.Array:
        return task.generate_views(parameters, frozen, tokens, cameras, slots, jax.random.key(1), request).pixels

    def views_of(captions: Sequence[str], cameras: Cameras) -> np.ndarray:
        generated = []
        for start in range(0, len(captions) - batch + 1, batch):
            rows = slice(start, start + batch)
            some = Cameras(*(jnp.asarray(part[rows], jnp.float32) for part in cameras))
            slots = jnp.arange(start, start + batch, dtype=jnp.int32)
            generated.append(np.asarray(generate(parameters, loaded.frozen, task.tokens(captions[rows]), slots, some)))
        return np.concatenate(generated)

    generated = views_of(captions, cameras)
    same = views_of(captions, Cameras(*(np.repeat(part[:, :1], 2, axis=1) for part in cameras)))
    # With static cameras only the scene moves, as its caption says.
    motion_captions = captions_of_motion(setting)[: len(captions)]
    static = Cameras(*(np.broadcast_to(part[:, :1, :1], part.shape) for part in cameras))
    moving = views_of(motion_captions, static)
    for name, clips in (("views", generated), ("moving", moving)):
        rows = [clip for pair in clips[:4] for clip in pair]
        (run / f"{name}.png").write_bytes(png_bytes(contact_sheet(rows, scale=2)))
    np.savez_compressed(run / "views.npz", views=generated, same_trajectory=same, moving=moving)
    real = real[: len(generated)]
    return {
        **agreement(generated, cameras, captions),
        "same trajectory": float(np.mean([views_mse(*pair) for pair in same])),
        **motion(moving, motion_captions),
        **{f"real {key}": value for key, value in agreement(real, cameras, captions).items()},
        "real same trajectory": 0.0,
    }


def agreement(videos: np.ndarray, cameras: Cameras, captions: Sequence[str]) -> dict[str, float]:
    """How well views `B 2 F H W 3` agree with each other, with their cameras `B 2 F ...` and with their captions."""
    named = [labels_of(caption).color for caption in captions[: len(videos)]]
    shown = [[classify_clip(view, PALETTE).color for view in pair] for pair in videos]
    return {
        "first frames": float(np.mean([views_mse(pair[0, :1], pair[1, :1]) for pair in videos])),
        "distance from line": float(
            np.nanmedian([line_distances(*row) for row in zip(videos, *cameras, strict=False)])
        ),
        "named color": float(np.mean([one == name for pair, name in zip(shown, named, strict=True) for one in pair])),
        **poses(videos, cameras),
    }


def motion(videos: np.ndarray, captions: Sequence[str]) -> dict[str, float]:
    """Agreement of the motion in views `B 2 F H W 3` of one static camera with each other and with the caption."""
    named = [labels_of(caption).direction for caption in captions[: len(videos)]]
    shown = [[classify_clip(view, PALETTE, DIRECTIONS).direction for view in pair] for pair in videos]
    return {
        "moving, one camera": float(np.mean([views_mse(*pair) for pair in videos])),
        "named direction": float(
            np.mean([one == name for pair, name in zip(shown, named, strict=True) for one in pair])
        ),
        "same direction": float(np.mean([pair[0] is not None and pair[0] == pair[1] for pair in shown])),
    }


def line_distances(pair: np.ndarray, intrinsics: np.ndarray, extrinsics: np.ndarray) -> np.ndarray:
    """Distance in pixels of the body in a view from the epipolar line of its position in the other, from frame 1 on."""
    places = np.concatenate([[places_of_body(view[1:]) for view in pair], np.ones((2, len(pair[0]) - 1, 1))], axis=-1)
    tracks = [Cameras(intrinsics[v, 1:].astype(np.float64), extrinsics[v, 1:].astype(np.float64)) for v in (0, 1)]
    distances = []
    for source, target in ((0, 1), (1, 0)):
        matrices = fundamental_matrices(tracks[source], tracks[target], pair.shape[2:4])
        lines = np.einsum("fij,fj->fi", matrices, places[source])
        distances.append(np.abs(np.sum(lines * places[target], axis=-1)) / np.linalg.norm(lines[:, :2], axis=-1))
    return np.stack(distances)


def places_of_body(video: np.ndarray) -> np.ndarray:
    """Center of the colored body in each frame, `F 2`, x and y in pixels; NaN where it is not visible.

    Pixels whose hue differs from both borders of their row belong to the body; shadows are gray.
    """
    hue = video - video.mean(axis=-1, keepdims=True)
    columns = max(1, video.shape[2] // 8)
    behind = np.median(np.concatenate([hue[:, :, :columns], hue[:, :, -columns:]], axis=2), axis=2, keepdims=True)
    mask = np.maximum(np.linalg.norm(hue - behind, axis=-1) - 40.0, 0.0)
    total = mask.sum(axis=(1, 2))
    total = np.where(total > 100.0, total, np.nan)
    x, y = (np.arange(side) + 0.5 for side in (video.shape[2], video.shape[1]))
    return np.stack([mask.sum(axis=1) @ x / total, mask.sum(axis=2) @ y / total], axis=-1)


def poses(videos: np.ndarray, cameras: Cameras) -> dict[str, float]:
    """Agreement of corresponding frames with their cameras; without the first frames, which share a camera."""
    errors, match = [], sift()
    for pair, intrinsics, extrinsics in zip(videos, *cameras, strict=False):
        tracks = []
        for view in (0, 1):
            world = relative(extrinsics[view].astype(np.float64), extrinsics[view, :1].astype(np.float64))
            tracks.append(Cameras(intrinsics[view, 1:].astype(np.float64), world[1:]))
        errors += pose_errors_across_views(*(_enlarged(view[1:]) for view in pair), *tracks, match)
    score = PoseScore.of(errors)
    return {
        "rotation AUC@20": score.rotation_auc[2],
        "translation AUC@20": score.translation_auc[2],
        "precision": score.precision,
        "matching score": score.matching_score,
    }


def _enlarged(video: np.ndarray) -> np.ndarray:
    return np.stack([cv2.resize(frame, (ENLARGED, ENLARGED), interpolation=cv2.INTER_CUBIC) for frame in video])


# The table.


def report(setting: Setting, found: Mapping[str, list[dict[str, Any]]]) -> str:
    """Markdown: one row per variant, mean and standard deviation over seeds."""
    measures = {
        "first frames": 4, "same trajectory": 4, "distance from line": 2, "rotation AUC@20": 3, "translation AUC@20": 3,
        "precision": 3, "matching score": 3, "named color": 2, "moving, one camera": 4, "named direction": 2,
        "same direction": 2,
    }  # fmt: skip
    found = {name: runs for name, runs in found.items() if runs}
    seeds = max(map(len, found.values()))
    lines = [
        f"# Multi-view consistency at the demo's scale: {setting.steps} steps after {setting.base_steps} of the "
        f"transformer, seeds {', '.join(map(str, setting.seeds[:seeds]))}",
        "",
        f"{setting.pairs} pairs of views per run, from held-out captions and cameras; mean and standard deviation over "
        "seeds. MSE (pixels in [0, 1]) between first frames, which share a camera, and between two views with the same "
        "trajectory; median distance in pixels of the body from the epipolar line of its position in the other view; "
        "agreement of corresponding frames with their cameras by SIFT; share of views with the color of the caption. "
        "For captions of moving bodies and one static camera: MSE between both views, share of views that move as "
        "named, and of pairs with the same direction. Loss of held-out pairs with cameras; seconds of training and "
        "compilation.",
        "",
    ]
    header = ["variant", *measures, "held-out loss", "seconds"]
    rows = [
        [name, *(_spread([row[key] for row in runs], digits) for key, digits in measures.items()),
         _spread([row["evaluation"]["loss_cameras"] for row in runs]), _spread([row["trained"] for row in runs], 0)]
        for name, runs in found.items()
    ]  # fmt: skip
    first = next(iter(found.values()))[0]
    known = [f"{first[f'real {key}']:.{digits}f}" if f"real {key}" in first else "" for key, digits in measures.items()]
    real = ["real clips", *known, "", ""]
    lines += ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows, real)]
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float], digits: int = 4) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _slug(name: str) -> str:
    return name.lower().replace(" ", "_")


if __name__ == "__main__":
    raise SystemExit(main())
