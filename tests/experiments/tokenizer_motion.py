"""Whether the ids of later frames say what moves, by how much moving pixels count in the tokenizer's loss.

    python -m tests.experiments.tokenizer_motion DATA --weight 10 --steps 600 --out runs/tokenizer

DATA is one data set of clips of 32x32 or several; the tokenizer is that of `configs/demo_ivideogpt_tokenizer.py` with
more codes, from scratch or from `--initial FOLDER` (exported). Every 50 steps, on 32 held-out clips: PSNR (whole
frames, moving pixels, the others) of later frames through the tokenizer with their ids and with those of other clips,
which are as good where ids say nothing; ids in use; ids that differ from those of the frame before; standard deviations
of latents before quantization, over the frames of a clip and over clips, frames and places. `--stop 0` scores
`--initial` alone.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jvgen import config
from jvgen.data.store.sources import open_source
from jvgen.data.stream.config import BucketConfig
from jvgen.data.stream.plan import ClipSpec
from jvgen.data.stream.transforms import load_example
from jvgen.interop.from_torch import import_folder
from jvgen.interop.to_torch import export_network
from jvgen.training.optimization.optimizer import clip, global_norm, make_optimizer
from tests.experiments.ivideogpt_metaworld import CONFIGS, MOVED

SIDE, CONTEXT, HORIZON, LATER, BATCH, HELD_OUT = 32, 2, 12, 3, 4, 32


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and print the scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--weight", type=float, default=0.0, help="task.moving_weight")
    parser.add_argument("--steps", type=int, default=300, help="of the schedule")
    parser.add_argument("--stop", type=int, help="end earlier")
    parser.add_argument("--codes", type=int, default=256, help="of each codebook")
    parser.add_argument("--initial", type=Path, help="exported tokenizer to start from")
    parser.add_argument("--out", type=Path, required=True, help="the tokenizer is exported to this folder")
    parsed = parser.parse_args(arguments)
    experiment = config.load(CONFIGS / "demo_ivideogpt_tokenizer.py")
    network = experiment.task.network.replace(context_codes=parsed.codes, future_codes=parsed.codes)
    task = experiment.task.replace(network=network, moving_weight=parsed.weight).build()
    train, validation = (
        [clip for folder in parsed.data for clip in episodes(folder, split)] for split in ("train", "validation")
    )
    held_out, rng = draw(validation, HELD_OUT, np.random.default_rng(7)), np.random.default_rng(0)
    parameters = {name: jax.jit(one.init)(jax.random.key(0)) for name, one in task.networks.items()}
    if parsed.initial is not None:
        parameters["tokenizer"] = import_folder(parsed.initial)[1]
    optimizer = make_optimizer(experiment.optimizer, {"tokenizer": task.networks["tokenizer"].axes}, parsed.steps)
    state = optimizer.init({"tokenizer": parameters["tokenizer"]})

    @jax.jit
    def step(parameters: Any, state: Any, number: jax.Array, video: jax.Array) -> tuple[Any, Any]:
        batch = {"video": video, "slot": jnp.arange(len(video))}

        def loss(tokenizer: Any) -> jax.Array:
            return task.loss({**parameters, "tokenizer": tokenizer}, {}, batch, jax.random.key(0))[0]

        gradients = {"tokenizer": jax.grad(loss)(parameters["tokenizer"])}
        gradients = clip(gradients, global_norm(gradients), optimizer.clip_norm)
        old = {"tokenizer": parameters["tokenizer"]}
        updates, state = optimizer.update(gradients, state, old, optimizer.learning_rate(number))
        return {**parameters, **jax.tree.map(jnp.add, old, updates)}, state

    @jax.jit
    def restart(parameters: Any, video: jax.Array, key: jax.Array, number: jax.Array) -> Any:
        return task.after_update(parameters, {}, {"video": video, "slot": jnp.arange(len(video))}, key, number)

    scores, began = scorer(task, held_out), time.process_time()
    print(f"step 0: {scores(parameters)}", flush=True)
    for number in range(parsed.steps if parsed.stop is None else parsed.stop):
        video = draw(train, BATCH, rng)
        parameters, state = step(parameters, state, jnp.int32(number), video)
        if number % experiment.task.restart.every == experiment.task.restart.every - 1:
            parameters = restart(parameters, video, jax.random.key(number), jnp.int32(number))
        if number % 50 == 49:
            print(f"step {number + 1}: {scores(parameters)}; {time.process_time() - began:.0f} s", flush=True)
    export_network(network, jax.device_get(parameters["tokenizer"]), parsed.out / "tokenizer", overwrite=True)
    return 0


def episodes(folder: Path, split: str) -> list[np.ndarray]:
    """All frames of all clips, uint8 `F H W 3`."""
    source = open_source(folder, split)
    whole = ClipSpec(start=0, stride=1, views=(0,), crop_y=0.5, crop_x=0.5, flip=False, caption=-1)
    records = [source.read(number) for number in range(len(source))]
    return [
        load_example(
            record, whole, BucketConfig(frames=record.frames, height=SIDE, width=SIDE, batch_size=1), "center_crop"
        )["video"]
        for record in records
    ]


def draw(clips: Sequence[np.ndarray], count: int, rng: np.random.Generator) -> np.ndarray:
    """Two frames of context and three of the twelve after them, uint8 `B F H W 3`."""
    drawn = []
    for _ in range(count):
        video = clips[rng.integers(len(clips))]
        start = rng.integers(0, len(video) - CONTEXT - HORIZON)
        later = CONTEXT + np.sort(rng.choice(HORIZON, LATER, replace=False))
        drawn.append(video[np.r_[start : start + CONTEXT, start + later]])
    return np.stack(drawn)


def scorer(task: Any, held_out: np.ndarray) -> Any:
    """A function of parameters that describes what its ids are worth."""

    @jax.jit
    def run(parameters: Any, video: jax.Array) -> tuple[jax.Array, ...]:
        model, frames = task.networks["tokenizer"].bind(parameters["tokenizer"]), video / 255.0
        tokens = model.tokenize(frames)
        latents = model.encode_future(frames[:, CONTEXT:], model.encode_context(frames[:, :CONTEXT])[1])
        _, conditions = model.detokenize_context(tokens.context)
        other = jnp.roll(tokens.future, len(video) // 2, axis=0)
        made = (jnp.clip(model.detokenize_future(ids, conditions), 0, 1) for ids in (tokens.future, other))
        everywhere = jnp.mean(jnp.std(latents, axis=(0, 1, 2)))
        return (*made, tokens.future, jnp.mean(jnp.std(latents, axis=1)), everywhere)

    true, last = held_out[:, CONTEXT:] / 255.0, held_out[:, CONTEXT - 1 : CONTEXT] / 255.0
    moving = (np.abs(true - last) > MOVED).any(axis=-1)

    def decibels(made: np.ndarray) -> str:
        error = (made - true) ** 2
        return " ".join(f"{-10 * np.log10(error[of].mean()):.2f}" for of in (..., moving, ~moving))

    print(f"copying: {decibels(np.broadcast_to(last, true.shape))}; {moving.mean():.1%} of pixels move", flush=True)

    def scores(parameters: Any) -> str:
        own, other, ids, spread, everywhere = (np.asarray(one) for one in run(parameters, held_out))
        return (
            f"own ids {decibels(own)}, other ids {decibels(other)}, {len(np.unique(ids))} ids, "
            f"{(ids[:, 1:] != ids[:, :-1]).mean():.1%} change, latents {spread:.4f} over frames, "
            f"{everywhere:.2f} in all"
        )

    return scores


if __name__ == "__main__":
    raise SystemExit(main())
