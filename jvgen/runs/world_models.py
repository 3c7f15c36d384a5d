"""Load a world model from a run or from exported networks, and the frames that an episode starts from."""

import numpy as np

from jvgen.config import ConfigError
from jvgen.control.world_model import WorldModel
from jvgen.data.store.records import Record
from jvgen.data.store.sources import open_source, splits
from jvgen.data.stream.config import BucketConfig, DataConfig
from jvgen.data.stream.plan import ClipSpec
from jvgen.data.stream.transforms import Resize, load_example
from jvgen.interop.from_torch import import_folder
from jvgen.models.ivideogpt.config import CompressiveTokenizerConfig, FrameTransformerConfig
from jvgen.models.ivideogpt.sampling import SamplingConfig
from jvgen.runs.inference import open_run, read_experiment
from jvgen.storage import Path, as_path
from jvgen.tasks.world_model import WorldModelConfig, check_trained_with, has_goal
from jvgen.training.checkpoint.reader import split_checkpoint


def load_world_model(
    folder: str | Path,
    *,
    frames: int | None = None,
    greedy: bool = False,
    ema: str | None = None,
    step: int | None = None,
) -> WorldModel:
    """Load a world model.

    Args:
      folder: run directory of a world model, one checkpoint of it (`RUN/checkpoints/STEP`), or a folder
        with exported `tokenizer/` and `transformer/`.
      frames: longest sequence, context included; by default that of the run's longest bucket, or what the exported
        transformer has positions for.
      greedy: choose the most likely ids instead of drawing them; also where the run's `task.sampling` says so.
      ema, step: weights of a run, see `jvgen.training.checkpoint.restore.load_for_inference`.

    Raises:
      ConfigError: neither kind of folder, a run of another task, or networks that do not belong together.
      CheckpointError: the run has no valid checkpoint.
    """
    folder = as_path(folder)
    if (folder / "tokenizer").is_dir() and (folder / "transformer").is_dir():
        return _load_exported(folder, frames, greedy)
    if not (split_checkpoint(folder)[0] / "checkpoints").is_dir():
        raise ConfigError(f"{folder}: neither a run directory nor a folder with tokenizer/ and transformer/.")
    experiment = read_experiment(folder)
    task = experiment.task
    if not isinstance(task, WorldModelConfig):
        raise ConfigError(f"{folder}: a run of {type(task).__name__}; expected one of WorldModelConfig.")
    run = open_run(folder, ema, step)
    longest = max(task.frames(bucket) for bucket in experiment.data.buckets)
    return WorldModel(
        task.tokenizer, run.frozen["tokenizer"], task.transformer, run.task.transformer(run.parameters, run.frozen),
        frames=longest if frames is None else frames,
        sampling=task.sampling.replace(greedy=greedy or task.sampling.greedy), goal=task.goal,
    )  # fmt: skip


def _load_exported(folder: Path, frames: int | None, greedy: bool) -> WorldModel:
    (tokenizer, tokenizer_parameters), (transformer, parameters) = (
        import_folder(folder / name) for name in ("tokenizer", "transformer")
    )
    if not isinstance(tokenizer, CompressiveTokenizerConfig) or not isinstance(transformer, FrameTransformerConfig):
        raise ConfigError(f"{folder}: its tokenizer/ and transformer/ are not those of iVideoGPT.")
    check_trained_with(folder)
    if frames is None:
        frames = _max_frames(tokenizer, transformer.max_positions)
    return WorldModel(
        tokenizer, tokenizer_parameters, transformer, parameters, frames=frames,
        sampling=SamplingConfig(greedy=greedy), goal=has_goal(folder),
    )  # fmt: skip


def _max_frames(tokenizer: CompressiveTokenizerConfig, positions: int) -> int:
    """Frames of the longest sequence that fits into this many positions."""
    frames = tokenizer.context_frames + 1
    while tokenizer.layout(frames + 1).length <= positions:
        frames += 1
    return frames


def training_data(folder: str | Path) -> DataConfig | None:
    """What the run of a world model was trained on; None for exported networks, which do not say it."""
    folder = as_path(folder)
    if not (split_checkpoint(folder)[0] / "checkpoints").is_dir():
        return None
    return read_experiment(folder).data


def trained_stride(training: DataConfig, data: str, record: int = 0, split: str | None = None) -> int:
    """Recorded frames from one frame to the next in a run's longest clips, the fewest where they differ.

    Args:
      training: of the run.
      data, split, record: a recording, whose source's stride, or whose frame rate, counts.
    """
    bucket = max(training.buckets, key=lambda bucket: bucket.frames)
    if bucket.frames_per_second is not None:
        return max(1, round(_recording(data, split, record).frames_per_second / bucket.frames_per_second))
    every = (*training.sources, *training.evaluation_sources)
    own = [source for source in every if as_path(source.path) == as_path(data)] or training.sources
    return min(bucket.strides) * min(source.frame_stride for source in own)


def read_context(
    world: WorldModel,
    data: str,
    split: str | None = None,
    record: int = 0,
    start: int = 0,
    stride: int = 1,
    resize: Resize = "center_crop",
) -> np.ndarray:
    """The first frames of an episode from a recording, uint8 `T H W 3`; of a goal-conditioned world the recording's
    last frame, which is the goal, and then these.

    Args:
      world: decides how many frames (T) and their size.
      data: data set folder.
      split: validation if there is one, else train, by default.
      record, start, stride: which recording, its first frame, and the distance between frames.
      resize: how frames are brought to the world's size, `DataConfig.resize`; "crop" is that of the center.

    Raises:
      ValueError: no such recording, or one that is too short.
    """
    if stride < 1:
        raise ValueError(f"--stride {stride}: 1 or more.")
    count, side = world.context_frames, world.tokenizer.resolution
    recording, goal = _recording(data, split, record), world.world.goal
    last = start + stride * (count - goal - 1)
    if start < 0 or last >= recording.frames:
        raise ValueError(
            f"--start-frame {start}: the context reaches frame {last}; the recording has {recording.frames}."
        )
    # As `WorldModelConfig.goal` orders the frames that the model is trained on.
    frames = (recording.frames - 1, *range(start, last + 1, stride)) if goal else None
    sample = ClipSpec(
        start=start, stride=stride, views=(0,), crop_y=0.5, crop_x=0.5, flip=False, caption=-1, frames=frames
    )
    bucket = BucketConfig(frames=count, height=side, width=side, batch_size=1)
    return load_example(recording, sample, bucket, resize)["video"]


def _recording(data: str, split: str | None, record: int) -> Record:
    split = split or ("validation" if "validation" in splits(data) else "train")
    source = open_source(data, split)
    if not 0 <= record < len(source):
        raise ValueError(f"--record {record}: {data} [{split}] has recordings 0 to {len(source) - 1}.")
    return source.read(record)
