"""Draw the README's picture of clips that the demo sampled: a row per clip, its caption above, frames at 4x.

python -m tests.experiments.demo_picture --demo runs/demo --out docs/demo_samples.png
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from jvgen.data.video_files import read_frames

COLUMNS, SCALE, GAP = 8, 4, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="folder that `make demo` wrote")
    parser.add_argument("--rows", type=int, default=6, help="clips to show, evenly spread over the prompts")
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    parsed = parser.parse_args()
    folder = parsed.demo / "samples"
    clips = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    # One clip of each prompt, in the order of the prompts: which are shown does not depend on how they look.
    first = list({clip["prompt"]: clip for clip in reversed(clips)}.values())[::-1]
    chosen = [first[round(number)] for number in np.linspace(0, len(first) - 1, parsed.rows)]
    draw([(clip["prompt"], np.stack(list(read_frames(folder / clip["file"])))) for clip in chosen], parsed.out)


def draw(clips: list[tuple[str, np.ndarray]], out: Path) -> None:
    """Write captions and clips, uint8 `F H W 3`, as one picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    side = clips[0][1].shape[1] * SCALE
    width = COLUMNS * side + (COLUMNS - 1) * GAP
    figure = Figure(figsize=(width / 100, len(clips) * (side + 26) / 100), dpi=100)
    FigureCanvasAgg(figure)
    for row, (caption, frames) in enumerate(clips):
        chosen = frames[np.linspace(0, len(frames) - 1, COLUMNS).round().astype(int)]
        large = [np.asarray(Image.fromarray(frame).resize((side, side), Image.Resampling.BICUBIC)) for frame in chosen]
        gap = np.full((side, GAP, 3), 255, np.uint8)
        strip = np.concatenate([part for frame in large for part in (frame, gap)][:-1], axis=1)
        bottom = 1 - (row + 1) / len(clips)
        axes = figure.add_axes((0, bottom, 1, side / (side + 26) / len(clips)))
        axes.imshow(strip, aspect="auto", interpolation="none")
        axes.set_axis_off()
        axes.set_title(f"“{caption}”", loc="left", fontsize=10, pad=4)
    figure.savefig(out, metadata={"Software": None})


if __name__ == "__main__":
    main()
