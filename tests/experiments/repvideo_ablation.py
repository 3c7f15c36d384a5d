"""What RepVideo's aggregation, and enhanced attention, do at the scale of the demo: several seeds, one table each.

    make demo
    python -m tests.experiments.repvideo_ablation --demo runs/demo --workdir runs/ablation --out ablation.md

Every variant is trained with the same data, steps and seeds; what was trained before is not trained again. With
`--latents FOLDER --vae FOLDER` (and --size) it runs on other clips; colors and directions are then not scored.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jvgen import config as configuration
from jvgen.data.scenes.labels import COLORS, Labels, captions_of, labels_of
from jvgen.evaluation.motion import motion_score
from jvgen.evaluation.temporal import adjacent_similarity, smoothness
from jvgen.interop.from_torch import read_config
from jvgen.models.video_dit.config import AggregationConfig, GateKind
from jvgen.models.video_dit.enhance import EnhanceConfig
from jvgen.runs.analysis import analyze_run
from jvgen.runs.evaluation import evaluate_run
from jvgen.runs.inference import open_run
from jvgen.tasks.clip_vae import temporal_downsampling
from jvgen.tasks.task import SampleRequest
from jvgen.training.experiment import Experiment
from jvgen.training.loop import train

CONFIG = Path(__file__).parents[2] / "configs" / "demo_text_to_video.py"
BASELINE = "CogVideoX"
VARIANTS: dict[str, AggregationConfig | None] = {
    BASELINE: None,
    "RepVideo": AggregationConfig(),
    "gates from 0": AggregationConfig(initial=0.0),
    "sigmoid gates": AggregationConfig(gate=GateKind.SIGMOID),
    "gate a channel": AggregationConfig(gate=GateKind.CHANNEL),
    "period 3": AggregationConfig(period=3),
}
ENHANCEMENTS: dict[str, EnhanceConfig | None] = {
    "none": None,
    "temperature 1": EnhanceConfig(temperature=1.0),
    "temperature 3.4": EnhanceConfig(),
    "temperature 8": EnhanceConfig(temperature=8.0),
    "adaptive, gain 1.1": EnhanceConfig(share="head", gain=1.1),
    "adaptive, gain 1.25": EnhanceConfig(share="head", gain=1.25),
}
TIMESTEPS = (900.0, 600.0, 300.0, 50.0)
DIRECTIONS = ("left", "right", "toward", "away")
DEMO_COLORS = ("red", "yellow", "green", "blue", "purple", "cyan")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all runs have in common."""

    latents: Path
    vae: Path
    workdir: Path
    steps: int
    seeds: tuple[int, ...]
    size: tuple[int, int, int]
    batches: int
    clips: int
    scored: bool
    sets: tuple[str, ...] = ()


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, measure, write the table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.experiments.repvideo_ablation", description=__doc__)
    parser.add_argument("--demo", type=Path, default=None, help="folder that `make demo` wrote: its latents and VAE")
    parser.add_argument("--latents", type=Path, default=None, help="data set of cached latents instead")
    parser.add_argument("--vae", type=Path, default=None, help="exported folder of the VAE that made them")
    parser.add_argument("--size", default="17x32x32", metavar="FxHxW", help="of clips, in pixels")
    parser.add_argument("--workdir", type=Path, required=True, help="one run below it for every variant and seed")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write; the numbers go beside it")
    parser.add_argument("--steps", type=int, default=460)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="which of them, with commas")
    parser.add_argument(
        "--enhanced", default=f"{BASELINE},RepVideo", help="variants that enhanced attention is tried on"
    )
    parser.add_argument("--batches", type=int, default=2, help="held-out batches")
    parser.add_argument("--clips", type=int, default=48, help="generated a run")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="PATH=VALUE", help="of every run")
    chosen = parser.parse_args(arguments)
    if (chosen.demo is None) == (chosen.latents is None or chosen.vae is None):
        parser.error("give --demo, or --latents and --vae")
    names = chosen.variants.split(",")
    unknown = [name for name in [*names, *filter(None, chosen.enhanced.split(","))] if name not in VARIANTS]
    if unknown:
        parser.error(f"{unknown[0]!r} is no variant; they are {', '.join(VARIANTS)}")
    setting = Setting(
        latents=chosen.latents or chosen.demo / "latents",
        vae=chosen.vae or chosen.demo / "export" / "video_vae" / "vae",
        workdir=chosen.workdir,
        steps=chosen.steps,
        seeds=tuple(int(seed) for seed in chosen.seeds.split(",")),
        size=tuple(int(side) for side in chosen.size.split("x")),
        batches=chosen.batches,
        clips=chosen.clips,
        scored=chosen.demo is not None,
        sets=tuple(chosen.sets),
    )
    found = {name: [measure(setting, name, seed, name in chosen.enhanced.split(",")) for seed in setting.seeds]
             for name in names}  # fmt: skip
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.with_suffix(".json").write_text(json.dumps(found, indent=1))
    chosen.out.write_text(report(setting, found))
    print(chosen.out.read_text())
    return 0


# Runs.


def experiment(setting: Setting, name: str, seed: int) -> Experiment:
    """The demo's run with a variant's denoiser of six layers, RepVideo's period."""
    base: Experiment = configuration.load(CONFIG)
    statistics_of = json.loads((setting.latents / "latent_statistics.json").read_text())
    frames, height, width = setting.size
    vae = read_config(str(setting.vae))
    group = temporal_downsampling(vae)
    base = base.replace(
        name=_slug(name),
        seed=seed,
        task=base.task.replace(
            denoiser=base.task.denoiser.replace(layers=6, aggregation=VARIANTS[name], temporal_compression=group),
            vae=vae,
            vae_weights=str(setting.vae),
            spatial_compression=vae.downsampling,
            temporal_compression=group,
            latent_shift=statistics_of["mean"],
            latent_scale=1 / statistics_of["deviation"],
            objective=base.task.objective.replace(bands=5),
        ),
        training=base.training.replace(steps=setting.steps, tensorboard=False, evaluate_every=0, visualize_every=0),
        checkpoint=base.checkpoint.replace(every=max(setting.steps, 1), keep_last=1),
    )
    changes = [
        f"data.sources.0.path={setting.latents}", f"data.evaluation_sources.0.path={setting.latents}",
        f"data.buckets.0.frames={frames}", f"data.buckets.0.height={height}", f"data.buckets.0.width={width}",
        *setting.sets,
    ]  # fmt: skip
    made = configuration.override(base, changes)
    configuration.validate_tree(made)
    return made


def measure(setting: Setting, name: str, seed: int, enhanced: bool) -> dict[str, Any]:
    """Train one run unless it is there, and everything that is asked about it; kept beside the run."""
    run = setting.workdir / f"{_slug(name)}_{seed}"
    kept = run / "measured.json"
    wanted = {"clips": setting.clips, "batches": setting.batches, "enhanced": enhanced}
    if kept.is_file():
        before = json.loads(kept.read_text())
        if before["asked"] == wanted:
            return before
    began = time.perf_counter()
    status = train(experiment(setting, name, seed), run)
    assert status == 0, f"{run} ended with status {status}"
    trained = time.perf_counter() - began
    layers = analyze_run(run, run / "analysis", timesteps=TIMESTEPS, batches=setting.batches)["timesteps"]
    row = {
        "asked": wanted,
        "seconds": trained,
        "evaluation": evaluate_run(run, batches=setting.batches),
        "similarity": {
            t: {key: np.mean(values[f"similarity_{key}"], axis=1).tolist() for key in ("before", "mean", "after")}
            for t, values in layers.items()
        },
        "gates": gates_of(run),
        "samples": sampled(setting, run, ENHANCEMENTS if enhanced else {"none": None}),
    }
    kept.write_text(json.dumps(row, indent=1))
    return row


def gates_of(run: Path) -> list[float] | None:
    """Gate of each layer of a run, averaged over channels; none without aggregation."""
    parameters = open_run(run).parameters["denoiser"]
    gates = parameters.get("aggregation", {}).get("gates")
    return None if gates is None else np.asarray(gates).reshape(gates.shape[0], -1).mean(axis=1).tolist()


def sampled(setting: Setting, run: Path, ways: Mapping[str, EnhanceConfig | None]) -> dict[str, dict[str, float]]:
    """Measures of clips from the same prompts and noise, for every way of enhancing attention."""
    loaded = open_run(run)
    task, parameters = loaded.task, loaded.compute_parameters()
    prompts, labels = prompts_of(setting.clips)
    tokens, slots = task.tokens(prompts), jnp.arange(len(prompts), dtype=jnp.int32)
    found = {}
    for name, enhance in ways.items():
        request = SampleRequest(*setting.size, enhance=enhance)

        @jax.jit
        def generate(parameters: Any, frozen: Any, tokens: jax.Array, slots: jax.Array, request=request) -> jax.Array:
            return task.generate(parameters, frozen, tokens, slots, jax.random.key(1), request).pixels

        clips = np.asarray(generate(parameters, loaded.frozen, tokens, slots))
        found[name] = temporal(clips)
        if setting.scored:
            palette = {color: COLORS[color] for color in DEMO_COLORS}
            marks = motion_score(list(clips), [(label.color, label.direction) for label in labels], palette, DIRECTIONS)
            found[name] |= {key: marks[f"{key}_accuracy"] for key in ("color", "direction")}
    return found


def prompts_of(count: int) -> tuple[list[str], list[Labels]]:
    """Captions of every color and direction in turn, and what they ask for."""
    made = [
        Labels(color=color, shape=("ball", "cube")[(a + b) % 2], direction=direction)
        for a, color in enumerate(DEMO_COLORS)
        for b, direction in enumerate(DIRECTIONS)
    ]
    prompts = [captions_of("dynamic", made[n % len(made)])[0] for n in range(count)]
    return prompts, [labels_of(prompt) for prompt in prompts]


def temporal(clips: np.ndarray) -> dict[str, float]:
    """Temporal measures of uint8 clips, averaged over them."""
    frames = jnp.asarray(clips, jnp.float32)
    measures: dict[str, Callable[..., jax.Array]] = {"smoothness": smoothness, "adjacent SSIM": adjacent_similarity}
    return {name: float(jnp.mean(measure(frames, data_range=255.0))) for name, measure in measures.items()}


# The table.


def report(setting: Setting, found: Mapping[str, list[dict[str, Any]]]) -> str:
    """Markdown: losses, similarities, samples, enhanced attention; mean and deviation over seeds."""
    # With few held-out clips a band may be without any.
    known = [set(row["evaluation"]) for rows in found.values() for row in rows]
    bands = sorted(key for key in set.intersection(*known) if key.startswith("loss_t"))
    lines = [
        f"# RepVideo at the scale of the demo: {setting.steps} steps, seeds {', '.join(map(str, setting.seeds))}",
        "", "Mean over seeds, and their standard deviation. Against the baseline: mean difference at equal seeds.",
        "", "## Validation loss by noise band (timestep)", "",
        *_table(["variant", "loss", "against " + BASELINE, *(_band(band) for band in bands), "seconds"], [
            [name, _spread([row["evaluation"]["loss"] for row in rows]),
             _difference(found, name, lambda row: row["evaluation"]["loss"]),
             *(_spread([row["evaluation"][band] for row in rows]) for band in bands),
             _spread([row["seconds"] for row in rows], 0)]
            for name, rows in found.items()
        ]),
        "", "## Cosine similarity of neighboring frames' features after each layer", "",
    ]  # fmt: skip
    layers = len(next(iter(found.values()))[0]["similarity"][f"{TIMESTEPS[0]:g}"]["after"])
    for t in (f"{t:g}" for t in TIMESTEPS):
        rows = [[name, *(_spread([row["similarity"][t]["after"][layer] for row in runs]) for layer in range(layers))]
                for name, runs in found.items()]  # fmt: skip
        lines += [f"At timestep {t}:", "", *_table(["variant", *(f"layer {n}" for n in range(layers))], rows), ""]
    gates = [[name, *(_spread([row["gates"][layer] for row in rows], 2) for layer in range(layers))]
             for name, rows in found.items() if rows[0]["gates"] is not None]  # fmt: skip
    if gates:
        lines += ["Gates as parameters (before the sigmoid), averaged over channels:", "",
                  *_table(["variant", *(f"layer {n}" for n in range(layers))], gates), ""]  # fmt: skip
    measures = list(next(iter(found.values()))[0]["samples"]["none"])
    rows = [[name, *(_spread([run["samples"]["none"][key] for run in runs]) for key in measures)]
            for name, runs in found.items()]  # fmt: skip
    lines += [f"## {setting.clips} clips per run", "", *_table(["variant", *measures], rows), ""]
    rows = [[f"{name}: {way}", *(_spread([run["samples"][way][key] for run in runs]) for key in measures)]
            for name, runs in found.items() for way in runs[0]["samples"] if len(runs[0]["samples"]) > 1]  # fmt: skip
    if rows:
        lines += ["## Enhanced attention, same prompts and noise", "", *_table(["model: attention", *measures], rows)]
    return "\n".join(lines).rstrip() + "\n"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]


def _spread(values: Sequence[float], digits: int = 4) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _difference(found: Mapping[str, list[dict]], name: str, value: Callable[[dict], float]) -> str:
    if BASELINE not in found or name == BASELINE:
        return ""
    return _spread([value(ours) - value(theirs) for ours, theirs in zip(found[name], found[BASELINE], strict=True)])


def _band(name: str) -> str:
    return "t " + "-".join(str(int(part)) for part in name.removeprefix("loss_t").split("_"))


def _slug(name: str) -> str:
    return name.lower().replace(" ", "_")


if __name__ == "__main__":
    raise SystemExit(main())
