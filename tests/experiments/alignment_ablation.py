"""Does representation alignment help a small video DiT? With features of a vision transformer that is trained here.

    python -m tests.experiments.alignment_ablation LATENTS --scenes SCENES --vae VAE --shift S --scale S --out a.jsonl

LATENTS are those of the demo's image VAE, with clips (`jvgen data build latents --keep-clips`), SCENES what they were
made of. The encoder, of DINOv2's make, learns to name color and shape of the body in single frames. Then the same DiT
is trained without alignment, aligned with each frame's own features (REPA) and with those of neighbors too (CREPA), by
Muon at the rate that was best without alignment. Validation loss after equal numbers of steps.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jvgen.data.scenes.labels import labels_of
from jvgen.data.store.sources import open_source
from jvgen.data.video_files import decode_window
from jvgen.interop.to_torch import export_network
from jvgen.models.dinov2.config import Dinov2Config
from jvgen.models.dinov2.model import Dinov2, prepared
from jvgen.nn.network import Network
from jvgen.storage import as_path
from jvgen.tasks.alignment import AlignmentConfig
from tests.experiments import small_dit

ENCODER = Dinov2Config(width=64, layers=4, heads=2, hidden=256, patch=8, side=32)
RATE = 16e-3  # of Muon, see docs/measured.md


def main() -> None:
    parser = small_dit.arguments(__doc__)
    parser.add_argument("--scenes", type=Path, required=True)
    parser.add_argument("--encoder-steps", type=int, default=400)
    asked = parser.parse_args()
    folder = asked.out.parent / "encoder"
    if not folder.exists():
        parameters, right = trained_encoder(asked.scenes, asked.encoder_steps)
        print(f"encoder: color and shape of held-out frames right in {right[0]:.2f}, {right[1]:.2f}", flush=True)
        export_network(ENCODER, parameters, folder)
    made, rows = small_dit.experiment(asked), small_dit.Rows(asked.out)
    crepa = AlignmentConfig(encoder=ENCODER, weights=str(folder), layer=1, hidden=128)
    arms = {
        "none": None,
        "crepa, decaying": crepa.replace(decay_steps=asked.steps // 2),
        "crepa": crepa,
        "repa": crepa.replace(distance=0),
    }
    settings = dataclasses.replace(made.optimizer, kind="muon", muon_blocks=small_dit.BLOCKS)

    @functools.cache
    def runner(name: str) -> small_dit.Runner:
        return small_dit.Runner(made.replace(task=made.task.replace(alignment=arms[name])), asked.steps)

    for seed in range(asked.seeds):
        for name in arms:
            rows.measured(lambda name=name, seed=seed: runner(name).run(settings, RATE, seed), arm=name, seed=seed)
    for name in arms:
        print(f"{name}: {small_dit.summary([row['loss'] for row in rows.rows if row['arm'] == name])}", flush=True)


def trained_encoder(scenes: Path, steps: int) -> tuple[dict, tuple[float, float]]:
    """Parameters, and the shares of held-out frames whose color and shape the class token names."""
    (frames, labels), (held_out, expected) = (labeled_frames(scenes, split) for split in ("train", "validation"))
    names = [sorted({one[part] for one in labels}) for part in (0, 1)]
    targets, expected = (
        jnp.array([[known.index(one) for known, one in zip(names, pair, strict=True)] for pair in pairs])
        for pairs in (labels, expected)
    )
    network = Network.of(lambda rngs: Dinov2(ENCODER, rngs=rngs))
    sizes = tuple(len(known) for known in names)
    heads = 0.02 * jax.random.normal(jax.random.key(1), (ENCODER.width, sum(sizes)))
    values = {"encoder": jax.jit(network.init)(jax.random.key(0)), "heads": heads}
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 2e-3, 20, steps), weight_decay=0.05)

    def scores(values: dict, images: jax.Array) -> list[jax.Array]:
        tokens = network.apply(values["encoder"], prepared(images / 255.0, (ENCODER.side, ENCODER.side)))
        return jnp.split(tokens[:, 0] @ values["heads"], [sizes[0]], axis=1)

    def loss(values: dict, images: jax.Array, wanted: jax.Array) -> jax.Array:
        found = scores(values, images)
        return sum(
            jnp.mean(optax.softmax_cross_entropy_with_integer_labels(found[part], wanted[:, part])) for part in (0, 1)
        )

    @jax.jit
    def step(values: dict, state: optax.OptState, images: jax.Array, wanted: jax.Array):
        value, gradient = jax.value_and_grad(loss)(values, images, wanted)
        updates, state = optimizer.update(gradient, state, values)
        return optax.apply_updates(values, updates), state, value

    state, rng = optimizer.init(values), np.random.default_rng(0)
    for _ in range(steps):
        rows = rng.integers(0, len(frames), 64)
        values, state, _ = step(values, state, jnp.asarray(frames[rows], jnp.float32), targets[rows])
    found = jax.jit(scores)(values, jnp.asarray(held_out, jnp.float32))
    right = tuple(float(jnp.mean(jnp.argmax(found[part], axis=1) == expected[:, part])) for part in (0, 1))
    return values["encoder"], right


def labeled_frames(scenes: Path, split: str) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """The first and a middle frame of each clip of the demo's scenes, uint8, and color and shape of its body."""
    source, frames, labels = open_source(as_path(str(scenes)), split), [], []
    for row in range(len(source)):
        record = source.read(row)
        label = labels_of(record.captions[0])
        for frame in decode_window(record.clips[0], [0, record.frames // 2]):
            frames.append(frame)
            labels.append((label.color, label.shape))
    return np.stack(frames), labels


if __name__ == "__main__":
    main()
