"""What actions are worth to a small world model of robots: pretrained on the embedded scenes, finetuned on Meta-World.

    python -m tests.experiments.ivideogpt_metaworld --metaworld FOLDER --workdir runs/world

FOLDER has Meta-World episodes as npz files, below a folder a task (iVideoGPT's demonstrations are such files). One
episode in five is held out. Two models are finetuned from the same weights, with actions and without; both predict the
held-out episodes from two frames, eight recorded frames a step, and so does copying the last frame. The model that has
seen scenes alone predicts held-out scenes. Half an hour or more on two cores; what was done before is not done again.
`--longer 4` trains four times as long, `--smoke` shows that everything runs.

The report: PSNR and SSIM of predicted frames by horizon, over all pixels and over those that move; how much worse the
models are with the actions of other windows; the error of their rewards; pictures.
"""

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jvgen.control.world_model import WorldModel, to_pixels
from jvgen.data.store.sources import open_source
from jvgen.data.stream.config import BucketConfig
from jvgen.data.stream.plan import ClipSpec
from jvgen.data.stream.transforms import load_example
from jvgen.demo.stages import Stages
from jvgen.evaluation.contact_sheets import contact_sheet, png_bytes
from jvgen.evaluation.plots import Series, line_plot, save_plot
from jvgen.evaluation.prediction import by_horizon
from jvgen.evaluation.reconstruction import peak_signal_to_noise, structural_similarity
from jvgen.runs.inference import open_run

CONFIGS = Path(__file__).parents[2] / "configs"
SIDE, FRAMES, STRIDE, CODES = 32, 8, 8, 512
MOVED = 0.08  # a pixel moves where some channel is this far from the last frame of the context


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is done.

    Attributes:
      scenes: rendered, to pretrain on.
      tokenizer, transformer: steps of pretraining, and of finetuning.
      windows: of the held-out episodes, to predict.
    """

    scenes: int
    tokenizer: tuple[int, int]
    transformer: tuple[int, int]
    windows: int

    def times(self, factor: float) -> "Scale":
        """With so many times the steps."""
        longer = {
            name: tuple(max(1, round(factor * steps)) for steps in getattr(self, name))
            for name in ("tokenizer", "transformer")
        }
        return dataclasses.replace(self, **longer)


SMOKE = Scale(scenes=12, tokenizer=(2, 2), transformer=(2, 2), windows=4)
STANDARD = Scale(scenes=300, tokenizer=(700, 700), transformer=(400, 400), windows=64)


def main(arguments: Sequence[str] | None = None) -> int:
    """Build data, train, compare, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metaworld", type=Path, required=True, help="folder of Meta-World episodes, npz")
    parser.add_argument("--workdir", type=Path, default=Path("runs/world"), help="everything is written here")
    parser.add_argument("--longer", type=float, default=1.0, help="factor on all steps")
    parser.add_argument("--smoke", action="store_true", help="a few steps: shows that everything runs")
    parsed = parser.parse_args(arguments)
    scale = SMOKE if parsed.smoke else STANDARD.times(parsed.longer)
    parsed.workdir.mkdir(parents=True, exist_ok=True)
    train(parsed.workdir, parsed.metaworld, scale)
    report = compare(parsed.workdir, scale)
    (parsed.workdir / "report.json").write_text(json.dumps(report, indent=1))
    (parsed.workdir / "report.md").write_text(as_markdown(report))
    save_plot(plot(report), parsed.workdir / "psnr")
    print(as_markdown(report))
    return 0


def train(workdir: Path, metaworld: Path, scale: Scale) -> None:
    """All commands: data sets, two tokenizers, three transformers."""
    stages = Stages(workdir)
    scenes, episodes, export = workdir / "scenes", workdir / "metaworld", workdir / "export"
    look = ["frames=12", f"height={SIDE}", f"width={SIDE}", "driven=1.0", "kinds.image=0", "kinds.static=0"]
    stages.run("scenes", ["data", "build", "scenes", "--out", scenes, "--train", scale.scenes,
                          "--validation", max(2, scale.scenes // 10), "--overwrite", *_sets(look)])  # fmt: skip
    stages.run("metaworld", ["data", "build", "robot-episodes", metaworld, "--clip-actions=-1,1",
                             "--validation-fraction", 0.2, "--out", episodes, "--overwrite"])  # fmt: skip

    def run(name: str, config: str, data: Path, steps: int, *, weights: Path | None = None, **settings: Any) -> Path:
        """Train (from weights, if there are any) and export; returns the network's folder."""
        values = {
            "data.sources.0.path": data, "data.evaluation_sources.0.path": data, "training.steps": steps,
            "checkpoint.every": max(1, steps // 2), "training.tensorboard": "false", **settings,
        }  # fmt: skip
        words = _sets([f"{path}={value}" for path, value in values.items()])
        folder, file = workdir / name, CONFIGS / f"demo_ivideogpt_{config}.py"
        if weights is not None:
            stages.run(
                f"initialize_{name}", ["import", weights, "--allow-partial", "--config", file, "--to", folder, *words]
            )
        stages.run(f"train_{name}", ["train", file, "--workdir", folder, *words])
        stages.run(f"export_{name}", ["export", folder, "--to", export / name])
        return export / name / config

    slow = {"data.buckets.0.strides": STRIDE}
    # Robots look more varied than the one cube of the configs.
    few = {"data.buckets.0.batch_size": 4, "data.buckets.0.segment.horizon": FRAMES,
           "task.network.context_codes": CODES, "task.network.future_codes": CODES}  # fmt: skip
    first = run("scenes_tokenizer", "tokenizer", scenes, scale.tokenizer[0], **few)
    # Dead codes are moved to where the robots need them; those in use keep what they mean to a transformer.
    tokenizer = run(
        "metaworld_tokenizer", "tokenizer", episodes, scale.tokenizer[1], weights=first,
        **few, **{"data.buckets.0.strides": f"1,{STRIDE // 2},{STRIDE}"},
    )  # fmt: skip
    many = {"data.buckets.0.frames": FRAMES, "task.tokenizer.context_codes": CODES,
            "task.tokenizer.future_codes": CODES, "task.transformer.vocabulary": 2 * CODES + 2}  # fmt: skip
    knows = {"task.tokenizer_weights": first, **many}
    transformer = run("scenes_transformer", "transformer", scenes, scale.transformer[0], **knows)
    for name, width in (("with_actions", 4), ("without_actions", 0)):
        run(
            name, "transformer", episodes, scale.transformer[1], weights=transformer,
            **{"task.tokenizer_weights": tokenizer, "task.transformer.action_width": width,
               "task.transformer.action_everywhere": "true" if width else "false", **many, **slow},
        )  # fmt: skip


def _sets(assignments: Sequence[str]) -> list[str]:
    return [word for assignment in assignments for word in ("--set", assignment)]


# Comparison.


def compare(workdir: Path, scale: Scale) -> dict[str, Any]:
    """Predict held-out windows in every way, and score what comes out."""
    report: dict[str, Any] = {"scale": dataclasses.asdict(scale), "stride": STRIDE}
    worlds = {name: open_world(workdir / name) for name in ("with_actions", "without_actions", "scenes_transformer")}
    windows = held_out(workdir / "metaworld", scale.windows, STRIDE)
    report["robots"] = predict(workdir, "robots", windows, worlds["with_actions"], worlds["without_actions"])
    report["decoding"] = decoding(worlds["with_actions"], *windows[:2])
    windows = held_out(workdir / "scenes", min(scale.windows, 30), 1)
    report["scenes"] = predict(workdir, "scenes", windows, worlds["scenes_transformer"], None)
    return report


def predict(
    workdir: Path, name: str, windows: tuple[np.ndarray, ...], world: WorldModel, blind: WorldModel | None
) -> dict[str, Any]:
    """All ways to predict some windows: `world` with their actions and with others, `blind` without, and copying."""
    video, actions, rewards = windows
    count = world.context_frames
    context, true = video[:, :count], video[:, count:] / np.float32(255)
    led = actions[:, count - 1 : -1]
    # A roll by half: the actions of another window, of robots mostly of another episode.
    made = {
        "actions": world.rollout(context, led),
        "actions of other windows": world.rollout(context, np.roll(led, len(led) // 2, axis=0)),
        **({"no actions": blind.rollout(context)} if blind is not None else {}),
    }
    clips = {way: np.asarray(prediction.frames) for way, prediction in made.items()}
    clips["copying the last frame"] = np.broadcast_to(context[:, -1:] / np.float32(255), true.shape)
    clips["tokenizer alone"] = reconstruct(world, video)
    moving = (np.abs(true - clips["copying the last frame"]) > MOVED).any(axis=-1)
    pictures(workdir, name, video, clips, count)
    return {
        "windows": len(video),
        "moving": float(moving.mean()),
        "scores": {way: score(clip, true, moving) for way, clip in clips.items()},
        "gains": {
            way: gain(clips, true, moving, "actions", way) for way in clips if way not in ("actions", "tokenizer alone")
        },
        "rewards": reward_errors(
            np.asarray(made["actions"].rewards), rewards[:, count - 1 : -1], rewards[:, count - 2 : count - 1]
        ),
    }


def held_out(folder: Path, count: int, stride: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Windows spread over the held-out episodes: uint8 frames `B F H W 3`, actions and rewards summed over strides."""
    source = open_source(folder, "validation")
    bucket = BucketConfig(frames=FRAMES, height=SIDE, width=SIDE, batch_size=1)
    windows, rows = [], -(-count // len(source))
    for number in range(count):
        record = source.read(number % len(source))
        last = record.frames - (FRAMES - 1) * stride - 1
        start = round(last * (number // len(source)) / max(rows - 1, 1))
        sample = ClipSpec(start=start, stride=stride, views=(0,), crop_y=0.5, crop_x=0.5, flip=False, caption=-1)
        windows.append(load_example(record, sample, bucket, "center_crop"))
    return tuple(np.stack([window[name] for window in windows]) for name in ("video", "actions", "rewards"))


def open_world(run: Path) -> WorldModel:
    """The trained model of a run, greedy."""
    loaded = open_run(run)
    task = loaded.experiment.task
    return WorldModel(
        task.tokenizer, loaded.frozen["tokenizer"], task.transformer, loaded.parameters["transformer"],
        frames=FRAMES, sampling=task.sampling,
    )  # fmt: skip


def reconstruct(world: WorldModel, video: np.ndarray) -> np.ndarray:
    """The true future frames through the tokenizer: what no prediction in its tokens can be much better than."""

    @jax.jit
    def run(parameters: Any, frames: jax.Array) -> jax.Array:
        model = world.world.network.bind(parameters)
        return model.detokenize(model.tokenize(frames))[:, world.context_frames :]

    return np.clip(np.asarray(run(world.weights.tokenizer, jnp.asarray(video) / 255.0)), 0, 1)


def decoding(world: WorldModel, video: np.ndarray, actions: np.ndarray) -> list[dict[str, Any]]:
    """Frames a second of the transformer alone, one id after the other and guessed together: one episode, and all."""
    count, weights, rows = world.context_frames, world.weights, []
    read = jax.jit(lambda p, x: world.world.network.bind(p).tokenize_context(x))
    prompt = world.world.layout.prompt(read(weights.tokenizer, jnp.asarray(video[:, :count]) / np.float32(255)))
    led = jnp.asarray(actions[:, count - 1 : -1])
    for episodes in (1, len(video)):
        keys, made = jax.random.split(jax.random.key(0), episodes), {}
        row: dict[str, Any] = {"episodes": episodes}
        for name, parallel in (("one by one", False), ("together", True)):
            sampling = world.world.sampling.replace(parallel=parallel)
            run = jax.jit(dataclasses.replace(world.world.decoder, sampling=sampling).rollout)
            seconds = []
            for _ in range(6):
                began = time.perf_counter()
                made[name] = np.asarray(run(weights.transformer, prompt[:episodes], led[:episodes], keys)[0])
                seconds.append(time.perf_counter() - began)
            row[name] = episodes * led.shape[1] / min(seconds[1:])
        row["equal"] = bool((made["one by one"] == made["together"]).all())
        rows.append(row)
    return rows


def score(clip: np.ndarray, true: np.ndarray, moving: np.ndarray) -> dict[str, list[float]]:
    """PSNR and SSIM by horizon, and PSNR over the pixels that moved (all windows together)."""
    measures = {"psnr": peak_signal_to_noise, "ssim": structural_similarity}
    scores = {}
    for name, measure in measures.items():
        measured = jax.jit(functools.partial(measure, data_range=1.0))(jnp.asarray(clip), jnp.asarray(true))
        scores[name] = [round(float(value), 4) for value in by_horizon(measured)]
    squares = np.where(moving[..., None], (clip - true) ** 2, 0).sum(axis=(0, 2, 3, 4))
    mean = squares / np.maximum(3 * moving.sum(axis=(0, 2, 3)), 1)
    scores["psnr_moving"] = [round(float(value), 4) for value in -10 * np.log10(np.maximum(mean, 1e-10))]
    return scores


def gain(
    clips: dict[str, np.ndarray], true: np.ndarray, moving: np.ndarray, better: str, worse: str
) -> dict[str, float]:
    """How much less squared error on moving pixels, window by window (they overlap), in dB and in windows won."""
    errors = [
        np.where(moving[..., None], (clips[name] - true) ** 2, 0).sum(axis=(1, 2, 3, 4)) for name in (better, worse)
    ]
    return {
        "decibel": float(10 * np.log10(errors[1].sum() / errors[0].sum())),
        "share_of_windows": float((errors[0] < errors[1]).mean()),
    }


def reward_errors(made: np.ndarray, true: np.ndarray, before: np.ndarray) -> dict[str, float]:
    """Mean absolute errors: of the model, of the mean reward, of the last reward seen; and the correlation."""
    return {
        "model": float(np.abs(made - true).mean()),
        "mean reward": float(np.abs(true - true.mean()).mean()),
        "last reward seen": float(np.abs(true - before).mean()),
        "correlation": float(np.corrcoef(made.ravel(), true.ravel())[0, 1]),
    }


def pictures(workdir: Path, name: str, video: np.ndarray, clips: dict[str, np.ndarray], count: int) -> None:
    """A sheet for some windows: true frames, then what each way makes of them, in the order of the tables."""
    shown = np.linspace(0, len(video) - 1, min(4, len(video))).round().astype(int)
    for number in shown:
        rows = [video[number]]
        for clip in clips.values():
            rows.append(np.concatenate([video[number, :count], to_pixels(clip[number])]))
        sheet = contact_sheet(rows, scale=3, labels=["recorded", *clips])
        (workdir / f"{name}_{number:03d}.png").write_bytes(png_bytes(sheet))


def as_markdown(report: dict[str, Any]) -> str:
    """Tables of a report."""
    lines: list[str] = []
    for name, title in (("robots", "Meta-World"), ("scenes", "Scenes")):
        part = report[name]
        step = report["stride"] if name == "robots" else 1
        lines += [
            f"## {title}: {part['windows']} windows of held-out recordings, recorded frames a step: {step}; "
            f"{part['moving']:.1%} of pixels move.",
            "",
        ]
        for measure, label in (
            ("psnr", "PSNR, dB"), ("psnr_moving", "PSNR of moving pixels, dB"), ("ssim", "SSIM"),
        ):  # fmt: skip
            horizon = len(next(iter(part["scores"].values()))[measure])
            lines += [f"| {label} | " + " | ".join(str(n + 1) for n in range(horizon)) + " |"]
            lines += ["|---" * (horizon + 1) + "|"]
            for way, scores in part["scores"].items():
                digits = 3 if measure == "ssim" else 2
                lines.append(f"| {way} | " + " | ".join(f"{value:.{digits}f}" for value in scores[measure]) + " |")
            lines.append("")
        for way, value in part["gains"].items():
            lines.append(
                f"actions over {way}, moving pixels: {value['decibel']:+.2f} dB, better in "
                f"{value['share_of_windows']:.0%} of windows"
            )
        rewards = part["rewards"]
        lines += [
            f"reward, mean absolute error: {rewards['model']:.3f}; predicting the mean {rewards['mean reward']:.3f}, "
            f"the last one {rewards['last reward seen']:.3f}; correlation {rewards['correlation']:.2f}",
            "",
        ]
    for row in report["decoding"]:
        lines.append(
            f"{row['episodes']} episodes at a time: {row['one by one']:.0f} frames/s one id after the other, "
            f"{row['together']:.0f} with a frame's ids guessed together (the same ids: {row['equal']})"
        )
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any]) -> Any:
    """PSNR of moving pixels by horizon, robots: a matplotlib figure."""
    series = [
        Series(name=name, x=list(range(1, len(scores["psnr"]) + 1)), y=scores["psnr_moving"])
        for name, scores in report["robots"]["scores"].items()
    ]
    return line_plot(series, x_label="steps ahead", y_label="PSNR of moving pixels (dB)")


if __name__ == "__main__":
    raise SystemExit(main())
