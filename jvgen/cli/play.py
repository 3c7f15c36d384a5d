"""`jvgen play`: step a world model from the keyboard or an action file."""

import argparse
import json
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

    if parsed.out is not None and parsed.out.suffix not in (".mp4", ".gif"):
        raise ValueError(f"--out {parsed.out}: episodes are written as .mp4 or .gif; change the ending.")
    world = open_world(parsed.model, frames=parsed.frames, greedy=parsed.greedy, ema=parsed.ema, step=parsed.step)
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


def open_world(model: Path, *, frames: int | None, greedy: bool, ema: str | None = None, step: int | None = None):
    """The world of a run's work folder, or of a folder with exported networks.

    Raises:
      ValueError: neither; a run of another kind; networks that do not belong together; `frames` missing.
    """
    from jvgen.control.world_model import WorldModel
    from jvgen.interop.digest import content_digest
    from jvgen.interop.from_torch import import_folder
    from jvgen.models.ivideogpt.config import CompressiveTokenizerConfig, FrameTransformerConfig
    from jvgen.models.ivideogpt.sampling import SamplingConfig
    from jvgen.runs.inference import open_run, read_experiment
    from jvgen.tasks.world_model import TRAINED_WITH, WorldModelConfig

    if (model / "tokenizer").is_dir() and (model / "transformer").is_dir():
        (tokenizer, tokenizer_parameters), (transformer, parameters) = (
            import_folder(model / name) for name in ("tokenizer", "transformer")
        )
        if not isinstance(tokenizer, CompressiveTokenizerConfig) or not isinstance(transformer, FrameTransformerConfig):
            raise ValueError(f"{model}: its tokenizer/ and transformer/ are not those of iVideoGPT.")
        told = model / TRAINED_WITH
        if told.is_file() and json.loads(told.read_text())["tokenizer"] != content_digest(model / "tokenizer"):
            raise ValueError(
                f"{model}: its tokenizer/ is not the one that its transformer/ was trained with; ids would mean other "
                "things. Copy the run's task.tokenizer_weights there, or, if it was only stored anew, delete "
                f"{told.name}."
            )
        if frames is None:
            frames = _longest(tokenizer, transformer.max_positions)
        sampling = SamplingConfig(greedy=greedy)
        return WorldModel(tokenizer, tokenizer_parameters, transformer, parameters, frames=frames, sampling=sampling)
    if not (model / "checkpoints").is_dir():
        raise ValueError(f"{model}: neither a run's work folder nor a folder with tokenizer/ and transformer/.")
    experiment = read_experiment(model)
    task = experiment.task
    if not isinstance(task, WorldModelConfig):
        raise ValueError(f"{model}: a run of {type(task).__name__}; `jvgen play` needs one of WorldModelConfig.")
    run = open_run(model, ema, step)
    longest = max(task.frames(bucket) for bucket in experiment.data.buckets)
    return WorldModel(
        task.tokenizer, run.frozen["tokenizer"], task.transformer, run.parameters["transformer"],
        frames=longest if frames is None else frames, sampling=task.sampling.replace(greedy=greedy),
    )  # fmt: skip


def _longest(tokenizer, positions: int) -> int:
    """Frames whose sequence has at most so many ids."""
    frames = tokenizer.context_frames + 1
    while tokenizer.layout(frames + 1).length <= positions:
        frames += 1
    return frames


def read_context(world, data: str, split: str | None, record: int, start: int, stride: int) -> np.ndarray:
    """The first frames of an episode, uint8 `T H W 3`, from a recording.

    Raises:
      ValueError: no such recording, or one that is too short.
    """
    from jvgen.data.store.sources import open_source, splits
    from jvgen.data.stream.config import BucketConfig
    from jvgen.data.stream.plan import Sample
    from jvgen.data.stream.transforms import load_example

    found = splits(data)
    split = split or ("validation" if "validation" in found else "train")
    source = open_source(data, split)
    if not 0 <= record < len(source):
        raise ValueError(f"--record {record}: {data} [{split}] has recordings 0 to {len(source) - 1}.")
    if stride < 1:
        raise ValueError(f"--stride {stride}: 1 or more.")
    count, side = world.context_frames, world.tokenizer.resolution
    recording = source.read(record)
    last = start + stride * (count - 1)
    if start < 0 or last >= recording.frames:
        raise ValueError(f"--start {start}: the context reaches frame {last}; the recording has {recording.frames}.")
    sample = Sample(start=start, stride=stride, views=(0,), crop_y=0.5, crop_x=0.5, flip=False, caption=-1)
    bucket = BucketConfig(frames=count, height=side, width=side, batch_size=1)
    return load_example(recording, sample, bucket, "center_crop")["video"]


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
