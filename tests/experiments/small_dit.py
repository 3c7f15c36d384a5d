"""A small video DiT on latents of the demo's image VAE, trained from scratch for a few hundred steps: what experiments
that compare ways of training share."""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jvgen import config, nested
from jvgen.data.stream.loader import Loader
from jvgen.parallel.mesh import single_device_mesh
from jvgen.training.experiment import Experiment
from jvgen.training.optimization.optimizer import OptimizerConfig, clip, global_norm, make_optimizer
from jvgen.training.program import Program

ROOT = Path(__file__).parents[2]
# Matrices of six, and of two, shifts, scales and gates.
BLOCKS = {"denoiser/.*_modulation/vectors/projection": 6, "denoiser/output_modulation": 2}


def arguments(description: str) -> argparse.ArgumentParser:
    """The options of every such experiment."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("latents")
    parser.add_argument("--vae", required=True)
    parser.add_argument("--shift", type=float, required=True)
    parser.add_argument("--scale", type=float, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8, help="clips per step")
    parser.add_argument("--out", type=Path, required=True)
    return parser


def experiment(asked: argparse.Namespace) -> Experiment:
    """Four layers of the demo's network, with a width of 64."""
    made = config.load(ROOT / "configs" / "demo_image_latents.py")
    bucket = made.data.buckets[0].replace(batch_size=asked.batch)
    task = made.task.replace(
        denoiser=made.task.denoiser.replace(layers=4, head_width=32, condition_width=64, text_width=64),
        text=made.task.text.replace(encoder=made.task.text.encoder.replace(width=64, layers=1, heads=2)),
        vae_weights=asked.vae, latent_shift=asked.shift, latent_scale=asked.scale,
    )  # fmt: skip
    sources = {"sources": made.data.sources, "evaluation_sources": made.data.evaluation_sources}
    sources = {name: tuple(s.replace(path=asked.latents) for s in value) for name, value in sources.items()}
    return made.replace(task=task, data=made.data.replace(buckets=(bucket,), threads=1, **sources))


class Runner:
    """Trains from scratch; a step is compiled once for each optimizer, with the learning rate as an input."""

    def __init__(self, made: Experiment, steps: int):
        self.program, self.steps = Program.build(made, single_device_mesh(jax.devices()[0])), steps
        self.compiled: dict[Any, Any] = {}
        task = self.program.task
        # The VAE is not needed: latents are cached.
        self.frozen = {name: value for name, value in task.load_frozen().items() if name != "vae"}
        held_out = Loader(made.data, seed=0, preprocess=task.preprocess, rows=self.program.rows, evaluation=True)
        with held_out.batches(0, 4) as batches:
            self.held_out = [self.program.shard_batch(batch.arrays, made.data.buckets[0]) for batch in batches]
        key = jax.random.key(123)
        self.validate = jax.jit(lambda parameters, batch: task.validation_loss(parameters, {}, batch, key))

    def run(self, settings: OptimizerConfig, rate: float, seed: int) -> dict[str, float]:
        """Losses of one run: "loss" on held-out clips, and over the last tenth of the steps "train" and metrics."""
        task, made = self.program.task, self.program.experiment
        bucket = made.data.buckets[0]
        known = settings.kind, tuple(settings.muon_blocks)
        if known not in self.compiled:
            optimizer = make_optimizer(settings, task.axes(), self.steps)

            def step(parameters, frozen, state, batch, key, rate):
                (loss, metrics), gradient = jax.value_and_grad(
                    lambda p: task.loss(p, frozen, batch, key), has_aux=True
                )(parameters)
                gradient = clip(gradient, global_norm(gradient), 1.0)
                updates, state = optimizer.update(gradient, state, parameters, rate)
                return jax.tree.map(jnp.add, parameters, updates), state, loss, metrics.get("alignment")

            self.compiled[known] = optimizer, jax.jit(step, donate_argnums=(0, 2))
        optimizer, step = self.compiled[known]
        key = jax.random.key(seed)
        parameters = jax.jit(task.init)(key)
        state, losses, aligned = optimizer.init(parameters), [], []
        loader = Loader(made.data, seed=seed, preprocess=task.preprocess, rows=self.program.rows)
        with loader.batches(0, self.steps) as batches:
            for number, loaded in enumerate(batches):
                batch = self.program.shard_batch(loaded.arrays, bucket)
                batch = {**batch, "step": jnp.full_like(batch["slot"], number)}
                warm = min(1.0, (number + 1) / 10)
                now = rate * warm * 0.5 * (1 + math.cos(math.pi * number / self.steps))
                parameters, state, loss, mean = step(
                    parameters, self.frozen, state, batch, jax.random.fold_in(key, number), jnp.float32(now)
                )
                losses.append(float(loss))
                if mean is not None and float(mean.count):
                    aligned.append(float(mean.total) / float(mean.count))
        found = [nested.flatten(self.validate(parameters, batch)) for batch in self.held_out]
        total, count = (
            sum(float(getattr(one["validation_loss"], part)) for one in found) for part in ("total", "count")
        )
        last = max(self.steps // 10, 1)
        row = {"loss": round(total / count, 5), "train": round(statistics.mean(losses[-last:]), 5)}
        return row | ({"alignment": round(statistics.mean(aligned[-last:]), 4)} if aligned else {})


class Rows:
    """Results as JSON lines; runs that are in the file are not repeated."""

    def __init__(self, file: Path):
        self.file = file
        self.rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def measured(self, run: Callable[[], dict[str, float]], **about: Any) -> dict[str, Any]:
        """The row of a run that `about` describes."""
        for row in self.rows:
            if about.items() <= row.items():
                return row
        start = time.perf_counter()
        row = {**about, **run()}
        row["seconds"] = round(time.perf_counter() - start, 1)
        self.rows.append(row)
        with self.file.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        print(row, flush=True)
        return row


def summary(losses: list[float]) -> str:
    """Mean and standard deviation."""
    spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
    return f"{statistics.mean(losses):.4f} +- {spread:.4f} of {losses}"
