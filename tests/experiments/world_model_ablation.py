"""What a small world model of the scenes needs: where ids stand in their frame, actions at every id, or neither.

    python -m tests.experiments.world_model_ablation --scenes DATA --tokenizer FOLDER --workdir runs/ablation

DATA is a data set of driven scenes or of an environment, or several, FOLDER an exported tokenizer of them. All windows
are tokenized once; then the transformer of `configs/demo_ivideogpt_transformer.py` is trained per variant and seed,
with equal steps and batches, and its greedy rollouts predict windows of the validation split. Every variant is exported
(`WORKDIR/VARIANT_SEED` holds tokenizer/ and transformer/, as `jvgen plan` and `jvgen play` take them).

The report: PSNR of whole frames and of moving pixels beside copying the last frame of the context and the tokenizer
alone, with its ids and with those of other windows; what actions of other windows cost; ids that no future frame can
hold; scrambled frames, of less than 20 dB; errors of rewards.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jvgen import config
from jvgen.control.world_model import WorldModel, to_pixels
from jvgen.data.store.sources import open_source
from jvgen.data.stream.config import BucketConfig
from jvgen.data.stream.plan import ClipSpec
from jvgen.data.stream.transforms import load_example
from jvgen.evaluation.contact_sheets import contact_sheet, png_bytes
from jvgen.evaluation.reconstruction import peak_signal_to_noise
from jvgen.interop.from_torch import import_folder
from jvgen.interop.to_torch import export_network
from jvgen.models.ivideogpt.config import CompressiveTokenizerConfig, FrameTransformerConfig
from jvgen.models.ivideogpt.objective import loss_terms, symlog
from jvgen.models.ivideogpt.sampling import SamplingConfig
from jvgen.models.ivideogpt.tokenizer import CompressiveTokenizer
from jvgen.models.ivideogpt.transformer import FrameTransformer
from jvgen.nn.network import Network
from jvgen.training.optimization.optimizer import clip, global_norm, make_optimizer
from tests.experiments.ivideogpt_metaworld import CONFIGS, MOVED, reward_errors, score

SCRAMBLED = 20.0  # dB of a whole frame
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {"tokens_per_frame": None, "action_everywhere": False},
    "places": {"action_everywhere": False},
    "actions everywhere": {"tokens_per_frame": None, "action_everywhere": True},
    "both": {"action_everywhere": True},
}


@dataclasses.dataclass(frozen=True)
class Windows:
    """Clips of a split as the transformer sees them: uint8 frames `B F H W 3`, ids `B L`, actions and rewards `B F`."""

    video: np.ndarray
    ids: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray


def main(arguments: Sequence[str] | None = None) -> int:
    """Tokenize, train all variants, score them, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--scenes", type=Path, nargs="+", required=True, help="data sets of the same actions and rewards"
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="exported tokenizer of these recordings")
    parser.add_argument("--workdir", type=Path, required=True, help="exports and the report are written here")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="some of them, by comma")
    parser.add_argument("--seeds", type=int, default=1, help="of initialization and order of batches")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--frames", type=int, default=10, help="of a window, two of context included")
    parser.add_argument("--windows", type=int, default=2, help="per training clip")
    parser.add_argument("--held-out", type=int, default=1, help="windows per held-out clip")
    parsed = parser.parse_args(arguments)
    parsed.workdir.mkdir(parents=True, exist_ok=True)
    tokenizer, weights = import_folder(parsed.tokenizer)
    train, held_out = (
        windows_of(parsed.scenes, split, tokenizer, weights, parsed.frames, count)
        for split, count in (("train", parsed.windows), ("validation", parsed.held_out))
    )
    print(f"{len(train.ids)} windows to train on, {len(held_out.ids)} held out", flush=True)
    report = (
        json.loads((parsed.workdir / "report.json").read_text()) if (parsed.workdir / "report.json").is_file() else {}
    )
    for seed in range(parsed.seeds):
        for name in parsed.variants.split(","):
            settings = {"tokens_per_frame": (tokenizer.context_tokens, tokenizer.future_tokens), **VARIANTS[name]}
            folder = parsed.workdir / f"{name.replace(' ', '_')}_{seed}"
            transformer, parameters, last = fit(train, tokenizer, parsed.frames, settings, parsed.steps, seed)
            for part, made, its in (("tokenizer", tokenizer, weights), ("transformer", transformer, parameters)):
                export_network(made, its, folder / part, overwrite=True)
            world = WorldModel(
                tokenizer, weights, transformer, parameters, frames=parsed.frames, sampling=SamplingConfig(greedy=True)
            )
            report[folder.name] = {"steps": parsed.steps, **last, **evaluate(world, held_out, folder, parsed.held_out)}
            (parsed.workdir / "report.json").write_text(json.dumps(report, indent=1))
            print(as_markdown({folder.name: report[folder.name]}), flush=True)
    print(as_markdown(report))
    return 0


def windows_of(
    folders: Sequence[Path],
    split: str,
    tokenizer: CompressiveTokenizerConfig,
    weights: Any,
    frames: int,
    count: int,
) -> Windows:
    """`count` windows per clip of a split of these data sets, spread from its start to its end."""
    bucket = BucketConfig(frames=frames, height=tokenizer.resolution, width=tokenizer.resolution, batch_size=1)
    network, layout = Network.of(lambda rngs: CompressiveTokenizer(tokenizer, rngs=rngs)), tokenizer.layout(frames)
    run = jax.jit(lambda p, x: layout.flatten(*network.bind(p).tokenize(x.astype(jnp.float32) / 255)))
    windows, ids = [], []
    sources = [open_source(folder, split) for folder in folders]
    for record in (source.read(number) for source in sources for number in range(len(source))):
        for start in np.linspace(0, record.frames - frames, count).round().astype(int) if count > 1 else [0]:
            sample = ClipSpec(start=int(start), stride=1, views=(0,), crop_y=0.5, crop_x=0.5, flip=False, caption=-1)
            windows.append(load_example(record, sample, bucket, "center_crop"))
    video, actions, rewards = (np.stack([window[key] for window in windows]) for key in ("video", "actions", "rewards"))
    for first in range(0, len(video), 16):
        rows = np.arange(first, first + 16).clip(max=len(video) - 1)
        ids.append(np.asarray(run(weights, video[rows]))[: len(video) - first])
    return Windows(video, np.concatenate(ids), actions, rewards)


def fit(
    train: Windows, tokenizer: CompressiveTokenizerConfig, frames: int, settings: dict[str, Any], steps: int, seed: int
) -> tuple[FrameTransformerConfig, Any, dict[str, float]]:
    """The demo's transformer with some settings, trained on token ids."""
    experiment = config.load(CONFIGS / "demo_ivideogpt_transformer.py")
    layout = tokenizer.layout(frames)
    transformer = experiment.task.transformer.replace(
        vocabulary=tokenizer.vocabulary,
        max_positions=max(layout.length, 256),
        action_width=train.actions.shape[-1],
        **settings,
    )
    transformer.check_tokenizer(tokenizer, frames)
    network = Network.of(lambda rngs: FrameTransformer(transformer, rngs=rngs))
    optimizer = make_optimizer(experiment.optimizer, {"transformer": network.axes}, steps)
    led = layout.action_frames

    def loss(parameters: Any, batch: tuple[jax.Array, ...]) -> tuple[jax.Array, Any]:
        ids, actions, rewards = batch
        terms = loss_terms(
            network.bind(parameters["transformer"]),
            ids,
            layout,
            actions=actions[:, led],
            rewards=symlog(rewards[:, led]),
        )
        return terms.cross_entropy + terms.reward, terms

    @jax.jit
    def step(parameters: Any, state: Any, number: jax.Array, batch: tuple[jax.Array, ...]) -> tuple[Any, Any, Any]:
        (_, terms), gradients = jax.value_and_grad(loss, has_aux=True)(parameters, batch)
        gradients = clip(gradients, global_norm(gradients), optimizer.clip_norm)
        updates, state = optimizer.update(gradients, state, parameters, optimizer.learning_rate(number))
        return jax.tree.map(jnp.add, parameters, updates), state, terms

    parameters = {"transformer": jax.jit(network.init)(jax.random.key(seed))}
    state, rng, began, terms = optimizer.init(parameters), np.random.default_rng(seed), time.perf_counter(), None
    order = np.concatenate([rng.permutation(len(train.ids)) for _ in range(1 + 8 * steps // len(train.ids))])
    for number in range(steps):
        rows = order[8 * number : 8 * number + 8]
        batch = (train.ids[rows], train.actions[rows], train.rewards[rows])
        parameters, state, terms = step(parameters, state, jnp.int32(number), batch)
        if number % 25 == 0 or number == steps - 1:
            print(
                f"{settings} step {number} cross-entropy {float(terms.cross_entropy):.3f} accuracy "
                f"{float(terms.accuracy):.3f} reward {float(terms.reward):.4f} {time.perf_counter() - began:.0f} s",
                flush=True,
            )
    return (
        transformer,
        parameters["transformer"],
        {"cross_entropy": float(terms.cross_entropy), "accuracy": float(terms.accuracy)},
    )


def evaluate(world: WorldModel, held_out: Windows, folder: Path, per_clip: int = 1) -> dict[str, Any]:
    """Scores of greedy rollouts, and a picture of four of them; `per_clip` windows of each clip follow each other."""
    count, video = world.context_frames, held_out.video
    # Another clip, and another time in it: at the same time all experts do much the same.
    away = len(video) // 2 + per_clip // 2
    context, true = video[:, :count], video[:, count:] / np.float32(255)
    led = held_out.actions[:, count - 1 : -1]
    made = world.rollout(context, led)
    other = world.rollout(context, np.roll(led, away, axis=0))
    clips = {"model": np.asarray(made.frames), "other actions": np.asarray(other.frames)}
    clips["copying"] = np.broadcast_to(context[:, -1:] / np.float32(255), true.shape)
    layout = world.world.layout
    ids = layout.future_ids(held_out.ids)
    network, weights = world.world.network, world.weights.tokenizer

    @jax.jit
    def reconstruct(parameters: Any, context: jax.Array, ids: jax.Array) -> jax.Array:
        model = network.bind(parameters)
        _, conditions = model.detokenize_context(model.tokenize_context(context / 255.0))
        return jnp.clip(model.detokenize_future(ids, conditions), 0, 1)

    clips["tokenizer alone"] = np.asarray(reconstruct(weights, context.astype(np.float32), ids))
    # As good: the ids say nothing of what moves, and no transformer can.
    clips["tokenizer with other ids"] = np.asarray(
        reconstruct(weights, context.astype(np.float32), np.roll(ids, away, axis=0))
    )
    moving = (np.abs(true - clips["copying"]) > MOVED).any(axis=-1)
    scores = {way: score(clip_of, true, moving) for way, clip_of in clips.items()}
    chosen = np.asarray(made.ids)
    valid = (chosen >= layout.context_codes) & (chosen < layout.context_codes + layout.future_codes)
    shown = ("model", "other actions", "tokenizer alone")
    rows = [row for number in range(4) for row in (
        video[number], *(np.concatenate([video[number, :count], to_pixels(clips[way][number])]) for way in shown)
    )]  # fmt: skip
    (folder / "rollouts.png").write_bytes(png_bytes(contact_sheet(rows, scale=3, labels=("recorded", *shown) * 4)))
    return {
        "windows": len(video),
        "moving": float(moving.mean()),
        **{
            way: {name: float(np.mean(of[name])) for name in ("psnr", "ssim", "psnr_moving")}
            for way, of in scores.items()
        },
        "impossible_ids": float(1 - valid.mean()),
        "scrambled": {
            way: int((frame_psnr(clips[way], true) < SCRAMBLED).sum()) for way in ("model", "tokenizer alone")
        },
        "frames": int(np.prod(true.shape[:2])),
        "rewards": reward_errors(
            np.asarray(made.rewards), held_out.rewards[:, count - 1 : -1], held_out.rewards[:, count - 2 : count - 1]
        ),
    }


def frame_psnr(made: np.ndarray, true: np.ndarray) -> np.ndarray:
    """PSNR of each frame, dB."""
    return np.asarray(peak_signal_to_noise(jnp.asarray(made), jnp.asarray(true), data_range=1.0))


def as_markdown(report: dict[str, Any]) -> str:
    """A table of a report."""
    columns = {
        "whole frames, dB": lambda row: f"{row['model']['psnr']:.2f}",
        "copying": lambda row: f"{row['copying']['psnr']:.2f}",
        "moving pixels, dB": lambda row: f"{row['model']['psnr_moving']:.2f}",
        "other windows' actions": lambda row: f"{row['other actions']['psnr_moving']:.2f}",
        "copying, moving": lambda row: f"{row['copying']['psnr_moving']:.2f}",
        "tokenizer, moving": lambda row: f"{row['tokenizer alone']['psnr_moving']:.2f}",
        "tokenizer with other windows' ids, moving": lambda row: (
            f"{row['tokenizer with other ids']['psnr_moving']:.2f}" if "tokenizer with other ids" in row else ""
        ),
        "impossible ids": lambda row: f"{row['impossible_ids']:.2%}",
        "scrambled frames": lambda row: (
            f"{row['scrambled']['model']} of {row['frames']} (tokenizer {row['scrambled']['tokenizer alone']})"
        ),
        "reward correlation": lambda row: f"{row['rewards']['correlation']:.2f}",
    }
    lines = [f"| variant | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for name, row in report.items():
        lines.append(f"| {name} | " + " | ".join(of(row) for of in columns.values()) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
