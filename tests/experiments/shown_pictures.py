"""Draw what a text-to-video run makes, and held-out clips beside what its VAE keeps of them, as moving pictures.

    python -m tests.experiments.shown_pictures --samples runs/shown/samples --out docs/shown_samples.webp
    python -m tests.experiments.shown_pictures --scenes runs/shown/scenes --vae runs/shown/export/video_vae/vae \\
        --out docs/shown_reconstructions.webp

With samples it also prints how many clips show the color and the direction of motion of their captions. Clips are taken
in order, evenly spread, never by how they look. The suffix of `--out` says the format: webp, gif, or png for a sheet.
"""

import argparse
import io
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jvgen.data.scenes.labels import COLORS, labels_of
from jvgen.data.store.sources import open_source
from jvgen.data.video_files import decode_window, read_frames
from jvgen.demo.report import DIRECTIONS
from jvgen.evaluation.motion import motion_score
from jvgen.interop.from_torch import import_folder
from jvgen.nn.network import Parameters
from jvgen.tasks.clip_vae import ClipVAE
from jvgen.tasks.pixels import to_uint8

HEAD, GAP, FRAMES_PER_SECOND = 30, 6, 8.0  # pixels, pixels, frames per second
LETTER = 5.5  # width of a letter in pixels


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw one picture; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--samples", type=Path, help="folder that `jvgen sample` wrote")
    which.add_argument("--scenes", type=Path, help="data set whose held-out clips are coded; needs --vae")
    parser.add_argument("--vae", type=Path, help="exported folder of a video VAE")
    parser.add_argument("--clips", type=int, default=8, help="clips to show")
    parser.add_argument("--columns", type=int, default=4, help="clips in a row")
    parser.add_argument("--scale", type=int, default=2, help="factor on a clip's size")
    parser.add_argument("--out", type=Path, required=True, help="file to write: .webp, .gif or .png")
    chosen = parser.parse_args(arguments)
    if chosen.scenes and not chosen.vae:
        parser.error("--scenes: needs --vae, an exported folder of a video VAE")
    if chosen.samples:
        captions, clips = sampled(chosen.samples)
        print(json.dumps(scores(clips, captions), indent=1))
        picked = np.linspace(0, len(clips) - 1, chosen.clips).round().astype(int)
        shown = [(captions[number], clips[number]) for number in picked]
    else:
        shown = reconstructed(chosen.scenes, chosen.vae, chosen.clips)
    chosen.out.write_bytes(encoded(grid(shown, chosen.columns, chosen.scale), chosen.out.suffix))
    return 0


def sampled(folder: Path) -> tuple[list[str], list[np.ndarray]]:
    """Captions and clips, uint8 `F H W 3`, of a folder of samples, in the order of their prompts."""
    rows = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    return [row["prompt"] for row in rows], [np.stack(list(read_frames(folder / row["file"]))) for row in rows]


def scores(clips: Sequence[np.ndarray], captions: Sequence[str]) -> dict[str, float]:
    """Shares of clips with the color and the direction of motion that their captions name, by `motion_score`."""
    labels = [labels_of(caption) for caption in captions]
    palette = {name: COLORS[name] for name in sorted({label.color for label in labels})}
    return motion_score(clips, [(label.color, label.direction) for label in labels], palette, DIRECTIONS)


def reconstructed(scenes: Path, vae: Path, count: int) -> list[tuple[str, np.ndarray]]:
    """The first held-out clips, each beside itself encoded and decoded, under its caption."""
    source, (config, weights) = open_source(scenes, "validation"), import_folder(vae)
    coder = ClipVAE(config)

    @jax.jit
    def code(weights: Parameters, clip: jax.Array) -> jax.Array:
        mean, _ = jnp.split(coder.encode(weights, clip[None]), 2, axis=-1)
        return to_uint8(coder.decode(weights, mean))[0]

    shown = []
    for row in range(count):
        record = source.read(row)
        clip = decode_window(record.clips[0], list(range(record.frames)))
        gap = np.full((*clip.shape[:2], 1, 3), 255, np.uint8)
        shown.append((record.captions[0], np.concatenate([clip, gap, np.asarray(code(weights, clip))], axis=2)))
    return shown


def grid(shown: Sequence[tuple[str, np.ndarray]], columns: int, scale: int) -> np.ndarray:
    """Captions above clips, uint8 `F H W 3` of one size each, in rows: one clip, uint8 `F H W 3`."""
    frames, height, width, _ = shown[0][1].shape
    height, width, rows = height * scale, width * scale, -(-len(shown) // columns)
    page_size = (columns * (width + GAP) - GAP, rows * (HEAD + height + GAP) - GAP)
    font = ImageFont.load_default(size=10)
    pages = []
    for frame in range(frames):
        page = Image.new("RGB", page_size, "white")
        for number, (caption, clip) in enumerate(shown):
            left, top = number % columns * (width + GAP), number // columns * (HEAD + height + GAP)
            lines = textwrap.fill(caption, int(width / LETTER))
            ImageDraw.Draw(page).multiline_text((left, top + 3), lines, fill=(0, 0, 0), font=font, spacing=1)
            large = Image.fromarray(clip[frame]).resize((width, height), Image.Resampling.NEAREST)
            page.paste(large, (left, top + HEAD))
        pages.append(np.asarray(page))
    return np.stack(pages)


def encoded(clip: np.ndarray, suffix: str) -> bytes:
    """A moving picture as `.webp` or `.gif`, or four of its frames below each other as `.png`.

    Raises:
      ValueError: another suffix.
    """
    if suffix == ".png":
        clip = np.concatenate(clip[np.linspace(0, len(clip) - 1, 4).round().astype(int)])[None]
    elif suffix not in (".webp", ".gif"):
        raise ValueError(f"suffix = {suffix!r}: must be .webp, .gif or .png.")
    first, *rest = [Image.fromarray(frame) for frame in clip]
    more: dict[str, Any] = {"append_images": rest, "save_all": True, "duration": round(1000 / FRAMES_PER_SECOND)}
    if suffix == ".webp":
        more |= {"loop": 0, "quality": 80, "method": 6}
    elif suffix == ".gif":
        more |= {"loop": 0}
    file = io.BytesIO()
    first.save(file, suffix.removeprefix("."), **({} if suffix == ".png" else more))
    return file.getvalue()


if __name__ == "__main__":
    raise SystemExit(main())
