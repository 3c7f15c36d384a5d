"""`jvgen play`: step a world model from the keyboard or an action file."""

import argparse
from pathlib import Path

import numpy as np

FORMATS = argparse.ArgumentDefaultsHelpFormatter


def add_play_command(verbs) -> None:
    """Add `play` to the verbs of `jvgen`."""
    summary = "step a world model with actions from the keyboard or a file, and see its frames"
    parser = verbs.add_parser(
        "play",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. Episodes begin at frames of a data set.",
        epilog="Example: jvgen play runs/world --data data/metaworld --out episode.mp4",
        formatter_class=FORMATS,
    )
    parser.add_argument(
        "model", type=Path, help="work folder of a world model's run, or a folder with tokenizer/ and transformer/"
    )
    parser.add_argument("--data", required=True, help="data set whose recordings episodes begin at")
    parser.add_argument("--split", default=None, help="of the data set; validation if there is one, else train")
    parser.add_argument("--record", type=int, default=0, help="which recording to begin at")
    parser.add_argument("--start", type=int, default=0, help="its frame to begin at")
    parser.add_argument("--stride", type=int, default=1, help="recorded frames between the frames of the context")
    parser.add_argument(
        "--actions", type=Path, default=None, help=".csv or .npy file, one action a line; else the keys"
    )
    parser.add_argument("--size", type=float, default=1.0, help="of the action that a key stands for")
    parser.add_argument(
        "--steps", type=int, default=None, help="frames to make; of a world without actions: its horizon"
    )
    parser.add_argument("--frames", type=int, default=None, help="longest sequence; the training bucket's if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--greedy", action="store_true", help="the likeliest ids instead of drawn ones")
    parser.add_argument("--ema", default="best", metavar="DECAY|raw|best", help="which weights of a run")
    parser.add_argument("--step", type=int, default=None, help="checkpoint of a run; the newest sound one if not given")
    parser.add_argument("--out", type=Path, default=None, help=".mp4 or .gif of the episode; rewards go beside it")
    parser.add_argument("--quiet", action="store_true", help="show no frames in the terminal")
    parser.set_defaults(handler=run_play)


def run_play(parsed: argparse.Namespace) -> int:
    """Play one episode."""
    import itertools

    from jvgen.control import play as playing
    from jvgen.runs.world_models import load_world_model, read_context

    if parsed.out is not None and parsed.out.suffix not in (".mp4", ".gif"):
        raise ValueError(f"--out {parsed.out}: episodes are written as .mp4 or .gif; change the ending.")
    world = load_world_model(parsed.model, frames=parsed.frames, greedy=parsed.greedy, ema=parsed.ema, step=parsed.step)
    context = read_context(world, parsed.data, parsed.split, parsed.record, parsed.start, parsed.stride)
    width = world.action_width
    if not width:
        actions = itertools.repeat(None, parsed.steps or world.horizon)
    elif parsed.actions is not None:
        actions = itertools.islice(playing.read_actions(parsed.actions, width), parsed.steps)
    else:
        print(playing.help_text(width))
        keys = playing.actions_from_keys(playing.pressed_keys(), width, parsed.size)
        actions = itertools.islice(keys, parsed.steps)
    show = None if parsed.quiet else playing.TerminalView()
    frames, rewards = playing.play(world, context, actions, seed=parsed.seed, show=show)
    print(f"{len(frames) - len(context)} frames" + (f", rewards sum to {sum(rewards):.3f}" if rewards else ""))
    if parsed.out is not None:
        _write(parsed.out, frames, rewards)
    return 0


def _write(out: Path, frames: np.ndarray, rewards: list[float]) -> None:
    from jvgen.data.video_files import encode_video
    from jvgen.evaluation.contact_sheet import gif_bytes

    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(encode_video(frames, 10.0) if out.suffix == ".mp4" else gif_bytes(frames, scale=4))
    print(f"wrote {out}")
    if rewards:
        table = out.with_suffix(".rewards.csv")
        table.write_text("step,reward\n" + "".join(f"{i + 1},{reward:.6g}\n" for i, reward in enumerate(rewards)))
        print(f"wrote {table}")
