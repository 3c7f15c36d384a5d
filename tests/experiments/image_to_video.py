"""What image to video learns at the scale of the demo: is the first frame kept, and does the caption decide the motion?

    jvgen train configs/demo_image_to_video.py ... --workdir runs/demo/image_to_video
    python -m tests.experiments.image_to_video --run runs/demo/image_to_video --scenes runs/demo/scenes --out i2v.json

Held-out clips of one moving body give the first frame and the caption. Each is continued with its own caption, and with
that of the opposite direction. In the demo's scenes the place where a body begins gives its direction away, so only the
second says whether captions are followed.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jvgen.data.scenes.labels import COLORS, captions_of, labels_of
from jvgen.data.store.sources import open_source
from jvgen.data.video_files import decode_window
from jvgen.evaluation.motion import motion_score
from jvgen.evaluation.reconstruction import peak_signal_to_noise
from jvgen.runs.generation import generate_in_batches, sample_request, slot_of
from jvgen.runs.inference import LoadedRun, open_run
from jvgen.storage import as_path
from jvgen.tasks.given_frames import GivenPixels

DIRECTIONS = ("left", "right", "toward", "away")
# Those of the demo's scenes.
PALETTE = {name: COLORS[name] for name in ("red", "yellow", "green", "blue", "purple", "cyan")}
OPPOSITE = {"left": "right", "right": "left", "toward": "away", "away": "toward"}


def recorded(scenes: Path, frames: int, count: int) -> tuple[np.ndarray, list]:
    """Held-out clips of a body that moves, uint8 `N F H W 3`, and their labels."""
    source, clips, labels = open_source(as_path(scenes), "validation"), [], []
    for row in range(len(source)):
        record = source.read(row)
        found = labels_of(record.captions[0]) if record.kind == "dynamic" else None
        if found is not None and found.direction in DIRECTIONS and record.frames >= frames and len(clips) < count:
            clips.append(decode_window(record.clips[0], list(range(frames))))
            labels.append(found)
    return np.stack(clips), labels


def continued(loaded: LoadedRun, clips: np.ndarray, captions: list[str], seed: int) -> np.ndarray:
    """A clip for each first frame and caption."""
    request = sample_request(loaded.experiment, given_frames=1)
    wanted = [(number, slot_of(number, 0)) for number in range(len(captions))]
    made = generate_in_batches(
        loaded,
        lambda task, parameters, frozen, tokens, slots, given: task.generate(
            parameters, frozen, tokens, slots, jax.random.key(seed), request, given
        ),
        captions, wanted, len(captions), conditions=GivenPixels(frames=clips[:, :1]),
    )  # fmt: skip
    return np.stack([pixels for _, pixels in sorted(made, key=lambda pair: pair[0])])


def psnr(made: np.ndarray, real: np.ndarray) -> float:
    return float(np.mean(peak_signal_to_noise(jnp.asarray(made), jnp.asarray(real), data_range=255.0)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--scenes", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    loaded = open_run(as_path(chosen.run))
    task, frozen = loaded.task, loaded.frozen
    clips, labels = recorded(chosen.scenes, loaded.experiment.data.buckets[0].frames, chosen.count)

    @jax.jit
    def reconstructed(frozen, clips):
        moments = task.encode(frozen, clips)
        latents = task.given.normalized(task.given.drawn(moments, jax.random.key(0), jnp.arange(len(clips)), False))
        return task.decode(frozen, latents).pixels

    decoded = np.asarray(reconstructed(frozen, clips))
    numbers = {"clips": len(clips), "step": loaded.step, "seed": chosen.seed}
    numbers["psnr_of_frame_0/autoencoder"] = psnr(decoded[:, 0], clips[:, 0])
    # How far frame 0 is from another one of the same clip: what a copy of the frame gains.
    numbers["psnr_of_frame_0/last_recorded_frame"] = psnr(clips[:, -1], clips[:, 0])
    for name, change in (("own caption", False), ("opposite caption", True)):
        said = [
            dataclasses.replace(label, direction=OPPOSITE[label.direction]) if change else label for label in labels
        ]
        made = continued(loaded, clips, [captions_of("dynamic", label)[0] for label in said], chosen.seed)
        score = motion_score(list(made), [(label.color, label.direction) for label in said], PALETTE, DIRECTIONS)
        numbers |= {f"{name}/{key}": value for key, value in score.items()}
        numbers[f"{name}/psnr_of_frame_0"] = psnr(made[:, 0], clips[:, 0])
        numbers[f"{name}/psnr_of_frame_0_to_decoded"] = psnr(made[:, 0], decoded[:, 0])
        others = np.roll(clips, 1, axis=0)
        numbers[f"{name}/psnr_of_frame_0_to_another_clips"] = psnr(made[:, 0], others[:, 0])
    score = motion_score(list(clips), [(label.color, label.direction) for label in labels], PALETTE, DIRECTIONS)
    numbers |= {f"recorded/{key}": value for key, value in score.items()}
    chosen.out.write_text(json.dumps(numbers, indent=1))
    print(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main()
