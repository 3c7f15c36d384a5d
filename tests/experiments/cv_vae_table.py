"""CV-VAE's tables on a small scale: how latents are shared with an image VAE, and which network shares them best.

    make demo
    python -m tests.experiments.cv_vae_table --demo runs/demo --out runs/cv_vae               # the paper's rows
    python -m tests.experiments.cv_vae_table --demo runs/demo --out runs/cv_vae --compare     # published networks, ours
    python -m tests.experiments.cv_vae_table --demo runs/demo --out runs/cv_vae --compare --seeds 3 --only causal
    python -m tests.experiments.cv_vae_table --out runs/x                    # other scenes, an image VAE of their own
    python -m tests.experiments.cv_vae_table --out runs/y --data data/tiles --size 9x64x64    # clips of `film_tiles`
    python -m tests.experiments.cv_vae_table --out runs/x --quick            # shows that it runs

Every row's video VAE is grown out of one image VAE (the demo's, `--image-vae`, or one that is trained first), trained
on the same clips for as many steps, and measured on held-out clips: fidelity of reconstructions; the frozen image
decoder on video latents; the video decoder on image latents; the distance of the two kinds of latents. With `--demo`
clips are of scenes like the demo's, rendered again without single images, so that what its diffusion model makes can
be decoded by the result. A second call goes on where the first was cut short; tables are written after every row.
An image VAE that is trained here has attention over pixels, which rows with attention along time need; the demo's has
none.
"""

import argparse
import json
import math
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from jvgen import config as configuration
from jvgen.autoencoding.evaluation import evaluate_vae
from jvgen.data.builders.scenes import build_scenes
from jvgen.data.scenes.scenes import SceneConfig
from jvgen.data.stream.config import BucketConfig
from jvgen.demo.demo import SCENES
from jvgen.interop.from_torch import read_config
from jvgen.models.cv_vae.config import CVVAEConfig
from jvgen.runs.exporting import export_run, import_run
from jvgen.training.experiment import Experiment
from jvgen.training.loop import train

CONFIGS = Path(__file__).parents[2] / "configs"

CAUSAL = ["temporal_attention.kind=none"]
BLENDED = ["blend_frames=true"]
DECODER_REPEATS = ["padding.decoder_time=repeat", "padding.upsample_time=repeat"]
SD21 = ["norm.over_clip=true", "norm.epsilon=1e-5", "padding.decoder_time=zeros", "padding.upsample_time=repeat"]
SD3 = ["norm.over_clip=true", "padding.border=repeat", "padding.downsample_around=true", *DECODER_REPEATS]
CAUSAL_ATTENTION = ["temporal_attention.kind=causal", "temporal_attention.window=4"]


def _shared(decoder: float, encoder: float, mapping: str, network: Sequence[str] = CAUSAL) -> list[str]:
    shared = (f"decoder_weight={decoder}", f"encoder_weight={encoder}", f"mapping={mapping}")
    return [*(f"task.shared.{field}" for field in shared), *(f"task.network.{field}" for field in network)]


# Rows by name: what is changed of `configs/demo_cv_vae.py`.
SHARING: dict[str, list[str]] = {
    "none": ["task.shared=none"],
    "encoder, random": _shared(0, 1, "random"),
    "decoder, random": _shared(1, 0, "random"),
    "both, random": _shared(1, 1, "random"),
    "decoder, first": _shared(1, 0, "first"),
    "decoder, average": _shared(1, 0, "average"),
    "decoder, slice": _shared(1, 0, "slice"),
}
NETWORKS: dict[str, list[str]] = {
    "published, z = 4": _shared(1, 0, "random", [*SD21, "temporal_attention.kind=clip"]),
    "published, z = 4, without attention along time": _shared(1, 0, "random", SD21),
    "published, for Stable Diffusion 3": _shared(1, 0, "random", SD3),
    "causal": SHARING["decoder, random"],
    "causal, attention along time": _shared(1, 0, "random", CAUSAL_ATTENTION),
    "causal, frames between blended": _shared(1, 0, "random", [*CAUSAL, *BLENDED]),
    "published, z = 4, without attention along time, frames between blended": _shared(1, 0, "random", SD21 + BLENDED),
    "causal, frames between blended, attention along time": _shared(1, 0, "random", [*CAUSAL_ATTENTION, *BLENDED]),
    "causal encoder, decoder of both sides": _shared(1, 0, "random", DECODER_REPEATS),
    "causal, norms over clips": _shared(1, 0, "random", ["norm.over_clip=true"]),
}
SHARING_BLENDED = {
    f"{name}, blended": [*changes, *(f"task.network.{field}" for field in BLENDED)] for name, changes in SHARING.items()
}
# Rows without training.
UNTRAINED = {"before training": SHARING["decoder, random"]}
UNTRAINED_BLENDED = {"before training, frames between blended": NETWORKS["causal, frames between blended"]}
# Tables by name: rows without training, and those that are trained.
TABLES: dict[str, tuple[Mapping[str, Sequence[str]], Mapping[str, Sequence[str]]]] = {
    "table": (UNTRAINED, SHARING),
    "sharing_blended": (UNTRAINED | UNTRAINED_BLENDED, SHARING_BLENDED),
    "networks": (UNTRAINED | UNTRAINED_BLENDED, NETWORKS),
}
# Columns: title, metric, digits; those that no row has are left out.
COLUMNS = (
    ("PSNR", "psnr", 2),
    ("SSIM", "ssim", 3),
    ("LPIPS", "perceptual_lpips", 3),
    ("perceptual", "perceptual_laplacian", 3),
    ("image decoder: PSNR", "image_decoder/psnr", 2),
    ("SSIM", "image_decoder/ssim", 3),
    ("LPIPS", "image_decoder/perceptual_lpips", 3),
    ("image latents: PSNR", "image_latents/psnr", 2),
    ("SSIM", "image_latents/ssim", 3),
    ("latent gap", "latent_gap", 3),
    ("mean gap", "mean_gap", 3),
    ("deviation ratio", "deviation_ratio", 3),
)
# Attention along time follows attention over pixels: rows that an image VAE without it cannot be inflated to.
TEMPORAL_ATTENTION = ("temporal_attention.kind=clip", "temporal_attention.kind=causal")


def summary(metrics: Mapping[str, float]) -> dict[str, float]:
    """One row's numbers from those of `jvgen evaluate --vae`.

    `latent_gap` is the root mean square distance of video and image latents, and `mean_gap` that of their channels'
    means, both in deviations of the image latents; `deviation_ratio` is the mean over channels of ours over theirs.
    """
    found = dict(metrics)
    channels = sorted(int(name.rpartition("_")[2]) for name in metrics if name.startswith("image_latent/mean_"))
    ours, theirs = (
        [(metrics[f"{kind}/mean_{c}"], metrics[f"{kind}/deviation_{c}"]) for c in channels]
        for kind in ("latent", "image_latent")
    )
    scale = math.sqrt(sum(deviation**2 for _, deviation in theirs) / len(channels))
    pairs = list(zip(ours, theirs, strict=True))
    found["latent_gap"] = math.sqrt(metrics["latent/squared_distance"]) / scale
    found["mean_gap"] = math.sqrt(sum((a[0] - b[0]) ** 2 for a, b in pairs) / len(channels)) / scale
    found["deviation_ratio"] = sum(a[1] / max(b[1], 1e-9) for a, b in pairs) / len(channels)
    return found


def table(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Markdown of each row's results, one a seed: their mean, and their deviation if there are several."""
    measured = {metric for seeds in rows.values() for row in seeds for metric in row}
    columns = [column for column in COLUMNS if column[1] in measured]
    lines = ["| | " + " | ".join(title for title, _, _ in columns) + " |", "|---|" + "---:|" * len(columns)]
    for name, seeds in rows.items():
        cells = [_cell([row[metric] for row in seeds if metric in row], digits) for _, metric, digits in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(values: Sequence[float], digits: int) -> str:
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is not done yet, and write the table."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.experiments.cv_vae_table", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for all results; a second call resumes in it")
    parser.set_defaults(table="table")
    which = parser.add_mutually_exclusive_group()
    for flag, name, about in (
        ("--compare", "networks", "networks instead of ways to share latents"),
        ("--blended", "sharing_blended", "ways to share latents, of networks that begin blended"),
    ):
        which.add_argument(flag, dest="table", action="store_const", const=name, help=about)
    parser.add_argument("--only", nargs="+", default=None, metavar="ROW", help="some rows")
    parser.add_argument("--demo", type=Path, default=None, help="folder of `make demo`: its image VAE and scenes")
    parser.add_argument("--data", type=Path, default=None, help="data set of clips instead of rendered scenes")
    parser.add_argument("--image-vae", type=Path, default=None, help="exported folder, instead of training one")
    parser.add_argument("--size", default="9x32x32", metavar="FxHxW", help="of clips, F = 4n + 1")
    parser.add_argument("--strides", default="1", help="recorded frames between two of a clip that is trained on")
    parser.add_argument("--batch", type=int, default=4, help="clips of a step")
    parser.add_argument("--steps", type=int, default=120, help="of every row")
    parser.add_argument("--image-steps", type=int, default=360, help="of the image VAE")
    parser.add_argument("--image-batch", type=int, default=32, help="images of a step of the image VAE")
    parser.add_argument("--channels", default="16,32,64", help="widths of the levels, finest first")
    parser.add_argument("--groups", type=int, default=8, help="of norms")
    parser.add_argument("--latent-channels", type=int, default=4, help="of an image VAE that is trained here")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw", help="muon takes longer to compile")
    parser.add_argument("--lpips", default=None, help="LPIPS weights for the measures; training keeps its substitute")
    parser.add_argument(
        "--set", nargs="+", default=(), metavar="FIELD=VALUE", help="changes of every row's config; --out of its own"
    )
    parser.add_argument("--held-out", type=int, default=64, help="clips that are measured on, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1, help="runs of every row, each with a seed of its own")
    parser.add_argument("--quick", action="store_true", help="tiny, two rows, two steps: measures nothing")
    chosen = parser.parse_args(arguments)
    _, rows = TABLES[chosen.table]
    unknown = [name for name in chosen.only or () if name not in rows]
    if unknown:
        parser.error(f"{unknown[0]!r} is no row; they are {'; '.join(rows)}")
    if chosen.quick:
        chosen.size, chosen.batch, chosen.steps, chosen.image_steps, chosen.held_out = "5x16x16", 2, 2, 2, 8
        chosen.channels, chosen.groups, chosen.only = "4,4,4", 2, list(rows)[2:4]
    print(run({name: rows[name] for name in chosen.only or rows}, chosen))
    return 0


def run(rows: Mapping[str, Sequence[str]], chosen: argparse.Namespace) -> str:
    """Everything that is not done yet; see `main`. Returns the table."""
    chosen.out.mkdir(parents=True, exist_ok=True)
    data = chosen.data or _scenes(chosen)
    image = chosen.image_vae or (chosen.demo / "export/image_vae/vae" if chosen.demo else _image_vae(chosen, data))
    if not read_config(image).mid_attention:
        rows = {
            name: changes
            for name, changes in rows.items()
            if not any(word in " ".join(changes) for word in TEMPORAL_ATTENTION)
        }
    done = chosen.out / "rows.json"
    known: dict[str, dict[str, float]] = json.loads(done.read_text()) if done.is_file() else {}
    untrained, _ = TABLES[chosen.table]
    # The same row may be in another table under another name: it is trained once.
    everything = {name: changes for _, trained in TABLES.values() for name, changes in trained.items()}
    found: dict[str, list[dict[str, float]]] = {}
    for name, changes in {**untrained, **rows}.items():
        for seed in range(chosen.seed, chosen.seed + (1 if name in untrained else chosen.seeds)):
            ending = "" if seed == chosen.seed else f", seed {seed}"
            key = name + ending
            twins = [other + ending for other, same in everything.items() if same == changes]
            twin = next((other for other in twins if other in known), None)
            if key not in known and twin is not None and name not in untrained:
                known[key] = known[twin]
            elif key not in known:
                known[key] = _row(key, changes, chosen, data, image, seed, trained=name not in untrained)
                done.write_text(json.dumps(known, indent=1) + "\n")
            found.setdefault(name, []).append(known[key])
            _write(chosen, found)
    return table(found)


def _row(
    name: str,
    changes: Sequence[str],
    chosen: argparse.Namespace,
    data: Path,
    image: Path,
    seed: int,
    *,
    trained: bool,
) -> dict[str, float]:
    folder = chosen.out / name.replace(",", "").replace(" ", "_")
    experiment = _video(chosen, data, image, [*changes, *chosen.set, f"seed={seed}"])
    began = time.perf_counter()
    checkpoints = folder / "checkpoints"
    if not (checkpoints.is_dir() and any(path.name.isdigit() for path in checkpoints.iterdir())):
        import_run(image, experiment, folder, inflate=True)
    if trained:
        status = train(experiment, folder)
        assert status == 0, f"{folder} ended with status {status}"
    seconds = time.perf_counter() - began
    if not (folder / "export").is_dir():
        export_run(folder, folder / "export")
    frames, height, width = _size(chosen)
    batch = min(chosen.held_out, 8)
    found = evaluate_vae(
        folder / "export" / "vae", str(data), frames=frames, size=(height, width), batch=batch,
        batches=max(chosen.held_out // batch, 1), image_vae=image, lpips=chosen.lpips, out=folder / "report",
    )  # fmt: skip
    return summary(found) | ({"training_seconds": seconds} if trained else {})


def _write(chosen: argparse.Namespace, rows: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    hidden = ("out", "only", "table")
    about = {
        name: _without_folders(value)
        for name, value in vars(chosen).items()
        if value not in (None, False, ()) and name not in hidden
    }
    (chosen.out / f"{chosen.table}.json").write_text(json.dumps({"settings": about, "rows": rows}, indent=1) + "\n")
    settings = ", ".join(f"{key} {value}" for key, value in about.items())
    (chosen.out / f"{chosen.table}.md").write_text(f"{table(rows)}\nSettings: {settings}.\n")


def _without_folders(value: object) -> str:
    return re.sub(r"[^\s=]*/", "", " ".join(value) if isinstance(value, list | tuple) else str(value))


def _size(chosen: argparse.Namespace) -> tuple[int, ...]:
    return tuple(int(side) for side in chosen.size.split("x"))


def _scenes(chosen: argparse.Namespace) -> Path:
    folder = chosen.out / "scenes"
    if not (folder / "dataset_info.json").is_file():
        frames, height, width = _size(chosen)
        if chosen.demo is not None:
            scenes = configuration.override(SceneConfig(), SCENES)
        else:
            scenes = SceneConfig(frames=2 * frames - 1, height=height, width=width, supersampling=1)
        scenes = scenes.replace(kinds={"image": 0.0, "static": 0.3, "dynamic": 0.7})
        train, held_out = (40, 8) if chosen.quick else (600, chosen.held_out)
        build_scenes(folder, scenes, train=train, validation=held_out, overwrite=True)
    return folder


def _image_vae(chosen: argparse.Namespace, data: Path) -> Path:
    run = chosen.out / "image_vae"
    if not (run / "export").is_dir():
        _, height, width = _size(chosen)
        frames = 4 if chosen.data else 1
        changes = [
            *(f"task.network.{field}" for field in _widths(chosen)), *_sources(data), f"seed={chosen.seed}",
            f"data.buckets.0.height={height}", f"data.buckets.0.width={width}", f"task.frames_per_clip={frames}",
            f"data.buckets.0.frames={frames}", f"data.buckets.0.batch_size={chosen.image_batch // frames}",
            "data.buckets.0.kinds=static,dynamic", *_schedule(chosen.image_steps),
        ]  # fmt: skip
        status = train(_changed(configuration.load(CONFIGS / "demo_image_vae.py"), changes), run)
        assert status == 0, f"{run} ended with status {status}"
        export_run(run, run / "export")
    return run / "export" / "vae"


def _video(chosen: argparse.Namespace, data: Path, image: Path, changes: Sequence[str]) -> Experiment:
    demo: Experiment = configuration.load(CONFIGS / "demo_cv_vae.py")
    frames, height, width = _size(chosen)
    bucket = BucketConfig(
        frames=frames, height=height, width=width, batch_size=chosen.batch, kinds=("static", "dynamic"),
        strides=tuple(int(stride) for stride in chosen.strides.split(",")),
    )  # fmt: skip
    config = read_config(image)
    demo = demo.replace(
        data=demo.data.replace(buckets=(bucket,)),
        task=demo.task.replace(image_vae=config, image_vae_weights=str(image), network=CVVAEConfig.causal(config)),
    )
    fields = [
        *_sources(data), *_schedule(chosen.steps), f"optimizer.kind={chosen.optimizer}",
        f"optimizer.learning_rate={chosen.learning_rate}", *changes,
    ]  # fmt: skip
    return _changed(demo, fields)


def _changed(experiment: Experiment, changes: Sequence[str]) -> Experiment:
    made = configuration.override(experiment, changes)
    configuration.validate_tree(made)
    return made


def _schedule(steps: int) -> list[str]:
    return [
        f"training.steps={steps}", "training.evaluate_every=0", "training.visualize_every=0",
        "training.tensorboard=false", f"checkpoint.every={steps}", "checkpoint.keep_last=1",
    ]  # fmt: skip


def _widths(chosen: argparse.Namespace) -> list[str]:
    return [
        f"block_channels={chosen.channels}", f"groups={chosen.groups}", "mid_attention=true",
        f"latent_channels={chosen.latent_channels}",
    ]  # fmt: skip


def _sources(data: Path) -> list[str]:
    return [f"data.sources.0.path={data}", f"data.evaluation_sources.0.path={data}"]


if __name__ == "__main__":
    raise SystemExit(main())
