"""Draw episodes of `jvgen plan` as one GIF: what happened, what each plan expected, the goal; a row per episode.

python -m tests.experiments.plan_gif --plans plans --out docs/planning.gif
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jvgen.data.video_files import read_frames
from jvgen.evaluation.contact_sheets import gif_bytes

TITLES = ("what happened", "what the plan expected", "goal")
SIDE, HEAD, GAP = 160, 22, 6  # pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=Path, required=True, help="folder that `jvgen plan --out` wrote")
    parser.add_argument("--episodes", type=int, default=2, help="the first ones")
    parser.add_argument("--every", type=int, default=1, help="draw every so many steps")
    parser.add_argument("--out", type=Path, required=True, help="GIF file to write")
    parsed = parser.parse_args()
    files = sorted(parsed.plans.glob("episode_*.mp4"))[: parsed.episodes]
    parsed.out.write_bytes(
        gif_bytes(picture([np.stack(list(read_frames(file))) for file in files], parsed.every), frames_per_second=4)
    )


def picture(episodes: list[np.ndarray], every: int = 1) -> np.ndarray:
    """Titles, and a row for each episode, uint8 `F H 3*H 3` each with its three parts side by side: uint8 `F H W 3`."""
    episodes = [frames[::every] for frames in episodes]
    length = max(len(frames) for frames in episodes)
    width = len(TITLES) * SIDE + (len(TITLES) - 1) * GAP
    clip = np.full((length, HEAD + len(episodes) * (SIDE + GAP) - GAP, width, 3), 255, np.uint8)
    for number in range(length):
        page = Image.fromarray(clip[number])
        draw = ImageDraw.Draw(page)
        for column, title in enumerate(TITLES):
            font = ImageFont.load_default(size=13)
            draw.text((column * (SIDE + GAP) + 2, 3), title, fill=(0, 0, 0), font=font)
        draw.text(
            (width - 2, 3),
            f"step {every * number}",
            fill=(110, 110, 110),
            font=ImageFont.load_default(size=13),
            anchor="ra",
        )
        for row, frames in enumerate(episodes):
            parts = np.split(frames[min(number, len(frames) - 1)], len(TITLES), axis=1)
            for column, part in enumerate(parts):
                large = Image.fromarray(part).resize((SIDE, SIDE), Image.Resampling.NEAREST)
                page.paste(large, (column * (SIDE + GAP), HEAD + row * (SIDE + GAP)))
        clip[number] = np.asarray(page)
    return clip


if __name__ == "__main__":
    main()
