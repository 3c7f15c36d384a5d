"""`jvgen play`: step a world model from the keyboard or an action file."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from jvgen.cli.arguments import add_checkpoint_arguments, add_command, number, path
from jvgen.value_rules import Count, CountOrZero, Frames, Records, Scale, Seed

if TYPE_CHECKING:
    import numpy as np


def add_commands(commands) -> None:
    """Add `play`."""
    parser = add_command(
        commands, "play", "step a world model with actions from the keyboard or a file, and show its frames",
        "jvgen play runs/world --data data/metaworld --out episode.mp4",
        details="An episode starts from context frames of a recorded clip; the goal of a model that takes one "
        "(task.goal) is the clip's last frame.",
        handler=run_play,
    )  # fmt: skip
    parser.add_argument(
        "model", type=path, metavar="MODEL",
        help="run directory of a world model, or a folder with exported tokenizer/ and transformer/",
    )  # fmt: skip
    add_checkpoint_arguments(parser)
    context = parser.add_argument_group("context frames")
    context.add_argument("--data", required=True, metavar="DIR", help="data set folder with the recorded clips")
    context.add_argument(
        "--split", metavar="NAME", help="split of the data set; validation if there is one, else train, if omitted"
    )
    context.add_argument(
        "--record", type=number(Records), default=0, metavar="INDEX", help="index of the recorded clip"
    )
    context.add_argument(
        "--start-frame",
        type=number(CountOrZero),
        default=0,
        metavar="INDEX",
        help="index of the clip's frame that the context starts at",
    )
    context.add_argument(
        "--stride",
        type=number(Frames),
        metavar="N",
        help="frame stride of the context: every N-th recorded frame; the run's if omitted, 1 for exports",
    )
    episode = parser.add_argument_group("episode")
    episode.add_argument(
        "--actions", type=path, metavar="FILE", help=".csv or .npy file with one action per row; else the keyboard acts"
    )
    episode.add_argument(
        "--action-scale", type=number(Scale), default=1.0, metavar="X",
        help="magnitude of the action component that a key press sets",
    )  # fmt: skip
    episode.add_argument(
        "--steps", type=number(Count), metavar="N",
        help="frames to generate; until the actions end if omitted, or the horizon of a model without actions",
    )  # fmt: skip
    episode.add_argument(
        "--frames", type=number(Frames), metavar="N",
        help="longest sequence in frames, context included; if omitted the run's, or all positions of an export",
    )  # fmt: skip
    episode.add_argument("--seed", type=number(Seed), default=0, metavar="N", help="random seed of the sampled tokens")
    episode.add_argument("--greedy", action="store_true", help="take the most likely token instead of sampling")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out", type=path, metavar="FILE",
        help=".mp4 or .gif file of the episode; predicted rewards are written to a .csv file beside it",
    )  # fmt: skip
    output.add_argument("--quiet", action="store_true", help="show no frames in the terminal")


def run_play(parsed: argparse.Namespace) -> int:
    """Play one episode."""
    import itertools

    from jvgen.control import play as playing
    from jvgen.runs.world_models import load_world_model, read_context, trained_stride, training_data

    if parsed.out is not None and parsed.out.suffix not in (".mp4", ".gif"):
        raise ValueError(f"--out {parsed.out}: episodes are written as .mp4 or .gif; change the suffix.")
    world = load_world_model(parsed.model, frames=parsed.frames, greedy=parsed.greedy, ema=parsed.ema, step=parsed.step)
    width, training, stride = world.action_width, training_data(parsed.model), parsed.stride or 1
    if parsed.actions is not None and not width:
        raise ValueError(f"--actions {parsed.actions}: this world model takes no actions; leave it out.")
    if training is not None and parsed.stride is None:
        stride = trained_stride(training, parsed.data, parsed.record, parsed.split)
    if stride > 1:
        note = f"; an action is the sum of {stride} recorded ones" if width else ""
        print(f"one recorded frame in {stride} (--stride){note}")
    context = read_context(
        world, parsed.data, split=parsed.split, record=parsed.record, start=parsed.start_frame, stride=stride,
        resize="center_crop" if training is None else training.resize,
    )  # fmt: skip
    if not width:
        actions = itertools.repeat(None, parsed.steps or world.horizon)
    elif parsed.actions is not None:
        actions = itertools.islice(playing.read_actions(parsed.actions, width), parsed.steps)
    else:
        print(playing.help_text(width))
        keys = playing.actions_from_keys(playing.pressed_keys(), width, parsed.action_scale)
        actions = itertools.islice(keys, parsed.steps)
    show = None if parsed.quiet else playing.TerminalView()
    frames, rewards = playing.play(world, context, actions, seed=parsed.seed, show=show)
    print(f"{len(frames) - len(context)} frames" + (f", sum of rewards {sum(rewards):.3f}" if rewards else ""))
    if parsed.out is not None:
        _write(parsed.out, frames, rewards)
    return 0


def _write(out: Path, frames: "np.ndarray", rewards: list[float]) -> None:
    from jvgen.data.video_files import encode_video
    from jvgen.evaluation.contact_sheets import gif_bytes
    from jvgen.storage import write_bytes, write_text

    write_bytes(out, encode_video(frames, 10.0) if out.suffix == ".mp4" else gif_bytes(frames, scale=4))
    print(f"wrote {out}")
    if rewards:
        table = out.with_suffix(".rewards.csv")
        write_text(table, "step,reward\n" + "".join(f"{i + 1},{reward:.6g}\n" for i, reward in enumerate(rewards)))
        print(f"wrote {table}")
