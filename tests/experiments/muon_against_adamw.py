"""Muon, with and without blocks, against AdamW on a small video DiT: validation loss after equal numbers of steps.

    python -m tests.experiments.muon_against_adamw LATENTS --vae VAE --shift S --scale S --out runs/muon.jsonl

LATENTS are those of the demo's image VAE (configs/demo_image_latents.py). For each optimizer one seed chooses the
learning rate, and three seeds are trained with it. Each run adds a JSON line to --out; runs in it are not repeated.
`--layout 2b` takes CogVideoX-2B's network, 30 layers and all, with a width of 64 instead of 1,920, and its schedule and
target, in place of four layers of the demo's.
"""

import dataclasses

from jvgen import config
from tests.experiments import small_dit

# Kind and whether there are blocks; by layout, learning rates to choose from.
OPTIMIZERS = {"adamw": ("adamw", False), "muon": ("muon", False), "muon with blocks": ("muon", True)}
RATES = {
    "demo": {name: (8e-3, 16e-3, 32e-3, 64e-3) for name in OPTIMIZERS} | {"adamw": (4e-3, 8e-3, 16e-3, 32e-3)},
    "2b": {"adamw": (2e-3, 4e-3, 8e-3, 16e-3, 32e-3), "muon with blocks": (8e-3, 16e-3, 32e-3, 64e-3)},
}


def main() -> None:
    parser = small_dit.arguments(__doc__)
    parser.add_argument("--layout", choices=tuple(RATES), default="demo")
    asked = parser.parse_args()
    made = small_dit.experiment(asked)
    if asked.layout == "2b":
        published = config.load(small_dit.ROOT / "configs" / "cogvideox_2b.py").task
        task = made.task.replace(
            denoiser=made.task.denoiser.replace(layers=published.denoiser.layers),
            schedule=published.schedule, objective=published.objective, sampler=published.sampler,
        )  # fmt: skip
        made = made.replace(task=task)
    runner, rows = small_dit.Runner(made, asked.steps), small_dit.Rows(asked.out)

    def loss(name: str, rate: float, seed: int) -> float:
        kind, blocks = OPTIMIZERS[name]
        settings = dataclasses.replace(made.optimizer, kind=kind, muon_blocks=small_dit.BLOCKS if blocks else {})
        run = lambda: runner.run(settings, rate, seed)  # noqa: E731
        return rows.measured(run, optimizer=name, rate=rate, seed=seed)["loss"]

    for name, rates in RATES[asked.layout].items():
        best = min(rates, key=lambda rate, name=name: loss(name, rate, 0))
        losses = [loss(name, best, seed) for seed in range(asked.seeds)]
        print(f"{name}: rate {best}, loss {small_dit.summary(losses)}", flush=True)


if __name__ == "__main__":
    main()
