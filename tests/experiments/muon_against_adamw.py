"""Muon, with and without blocks, against AdamW on a small video DiT: validation loss after equal numbers of steps.

    python tests/experiments/muon_against_adamw.py LATENTS --vae VAE --shift S --scale S --out runs/muon.jsonl

LATENTS are those of the demo's image VAE (configs/demo_image_latents.py). For each optimizer one seed chooses the
learning rate, and three seeds are trained with it. Each run adds a JSON line to --out; runs in it are not repeated.
`--layout 2b` takes CogVideoX-2B's network, 30 layers and all, with a width of 64 instead of 1,920, and its schedule and
target, in place of four layers of the demo's.
"""

import argparse
import dataclasses
import json
import math
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from jvgen import config, nested
from jvgen.data.stream.loader import Loader
from jvgen.parallel.mesh import single_device_mesh
from jvgen.training.optimization.optimizer import clip, global_norm, make_optimizer
from jvgen.training.program import Program

ROOT = Path(__file__).parents[2]
BLOCKS = {"denoiser/.*_modulation/vectors/projection": 6, "denoiser/output_modulation": 2}
# Kind and blocks of each optimizer; by layout, learning rates to choose from.
OPTIMIZERS = {"adamw": ("adamw", {}), "muon": ("muon", {}), "muon with blocks": ("muon", BLOCKS)}
RATES = {
    "demo": {name: (8e-3, 16e-3, 32e-3, 64e-3) for name in OPTIMIZERS} | {"adamw": (4e-3, 8e-3, 16e-3, 32e-3)},
    "2b": {"adamw": (2e-3, 4e-3, 8e-3), "muon with blocks": (8e-3, 16e-3, 32e-3)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("latents")
    parser.add_argument("--vae", required=True)
    parser.add_argument("--shift", type=float, required=True)
    parser.add_argument("--scale", type=float, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8, help="clips per step")
    parser.add_argument("--layout", choices=tuple(RATES), default="demo")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    made = config.load(ROOT / "configs" / "demo_image_latents.py")
    bucket = made.data.buckets[0].replace(batch_size=asked.batch)
    task = made.task.replace(
        denoiser=made.task.denoiser.replace(layers=4, head_width=32, condition_width=64, text_width=64),
        text=made.task.text.replace(encoder=made.task.text.encoder.replace(width=64, layers=1, heads=2)),
        vae_weights=asked.vae, latent_shift=asked.shift, latent_scale=asked.scale,
    )  # fmt: skip
    if asked.layout == "2b":
        published = config.load(ROOT / "configs" / "cogvideox_2b.py").task
        task = task.replace(
            denoiser=task.denoiser.replace(layers=published.denoiser.layers),
            schedule=published.schedule, objective=published.objective, sampler=published.sampler,
        )  # fmt: skip
    sources = {"sources": made.data.sources, "evaluation_sources": made.data.evaluation_sources}
    sources = {name: tuple(s.replace(path=asked.latents) for s in value) for name, value in sources.items()}
    experiment = made.replace(task=task, data=made.data.replace(buckets=(bucket,), threads=1, **sources))
    program = Program.build(experiment, single_device_mesh(jax.devices()[0]))
    runner = Runner(program, asked.steps)
    rows = [json.loads(line) for line in asked.out.read_text().splitlines()] if asked.out.exists() else []

    def measured(name: str, rate: float, seed: int) -> float:
        known = [row for row in rows if (row["optimizer"], row["rate"], row["seed"]) == (name, rate, seed)]
        if not known:
            start = time.perf_counter()
            row = {"optimizer": name, "rate": rate, "seed": seed, **runner.run(name, rate, seed)}
            row["seconds"] = round(time.perf_counter() - start, 1)
            rows.append(row)
            known = [row]
            with asked.out.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
            print(row, flush=True)
        return known[0]["loss"]

    for name, rates in RATES[asked.layout].items():
        best = min(rates, key=lambda rate, name=name: measured(name, rate, 0))
        losses = [measured(name, best, seed) for seed in range(asked.seeds)]
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        print(f"{name}: rate {best}, loss {statistics.mean(losses):.4f} +- {spread:.4f} of {losses}", flush=True)


class Runner:
    """Trains from scratch; a step is compiled once for each optimizer, with the learning rate as an input."""

    def __init__(self, program: Program, steps: int):
        self.program, self.steps = program, steps
        self.compiled = {}
        experiment, task = program.experiment, program.task
        held_out = Loader(experiment.data, seed=0, preprocess=task.preprocess, rows=program.rows, evaluation=True)
        with held_out.batches(0, 4) as batches:
            self.held_out = [program.shard_batch(batch.arrays, experiment.data.buckets[0]) for batch in batches]
        key = jax.random.key(123)
        self.validate = jax.jit(lambda parameters, batch: task.validation_loss(parameters, {}, batch, key))

    def run(self, name: str, rate: float, seed: int) -> dict[str, float]:
        """Losses of one run: "loss" on held-out clips, "train" over the last tenth of the steps."""
        task, experiment = self.program.task, self.program.experiment
        bucket = experiment.data.buckets[0]
        if name not in self.compiled:
            kind, blocks = OPTIMIZERS[name]
            settings = dataclasses.replace(experiment.optimizer, kind=kind, muon_blocks=blocks)
            optimizer = make_optimizer(settings, task.axes(), self.steps)

            def step(parameters, state, batch, key, rate):
                (loss, _), gradient = jax.value_and_grad(lambda p: task.loss(p, {}, batch, key), has_aux=True)(
                    parameters
                )
                gradient = clip(gradient, global_norm(gradient), 1.0)
                updates, state = optimizer.update(gradient, state, parameters, rate)
                return jax.tree.map(jnp.add, parameters, updates), state, loss

            self.compiled[name] = optimizer, jax.jit(step, donate_argnums=(0, 1))
        optimizer, step = self.compiled[name]
        key = jax.random.key(seed)
        parameters = jax.jit(task.init)(key)
        state, losses = optimizer.init(parameters), []
        loader = Loader(experiment.data, seed=seed, preprocess=task.preprocess, rows=self.program.rows)
        with loader.batches(0, self.steps) as batches:
            for number, loaded in enumerate(batches):
                batch = self.program.shard_batch(loaded.arrays, bucket)
                warm = min(1.0, (number + 1) / 10)
                now = rate * warm * 0.5 * (1 + math.cos(math.pi * number / self.steps))
                parameters, state, loss = step(
                    parameters, state, batch, jax.random.fold_in(key, number), jnp.float32(now)
                )
                losses.append(float(loss))
        found = [nested.flatten(self.validate(parameters, batch))["validation_loss"] for batch in self.held_out]
        total = sum(float(mean.total) for mean in found) / sum(float(mean.count) for mean in found)
        return {"loss": round(total, 5), "train": round(statistics.mean(losses[-self.steps // 10 :]), 5)}


if __name__ == "__main__":
    main()
