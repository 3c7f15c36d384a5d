"""Generate clips in batches of one compiled shape, for trained runs, with or without several views."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jvgen.data.stream.config import BucketConfig
from jvgen.models.video_dit.enhance import EnhanceConfig
from jvgen.nn.network import Parameters
from jvgen.runs.faults import Faults
from jvgen.runs.given_files import NOTHING, GivenFiles
from jvgen.runs.inference import LoadedRun
from jvgen.runs.prompts import warn_of_truncated
from jvgen.tasks.pipeline_folder import frames_per_second
from jvgen.tasks.task import Generated, SampleRequest, Task, TaskConfig
from jvgen.terminal import progress
from jvgen.training.experiment import Experiment

# Slots of different prompts never meet: clip i of prompt p has the slot p * CLIPS_PER_PROMPT + i.
CLIPS_PER_PROMPT = 1 << 12

# (task, parameters, frozen parameters, tokens, slots[, conditions]) -> clips, traced under `jax.jit`.
Generate = Callable[..., Generated]


def largest_bucket(task: TaskConfig, buckets: Sequence[BucketConfig]) -> BucketConfig:
    """The bucket with the longest clips, and of those the largest: what a run that had images or smaller clips too, or
    began with them, is made for."""
    return max(buckets, key=lambda bucket: (task.frames_of(bucket), bucket.height * bucket.width))


def clip_rate(experiment: Experiment) -> float:
    """Frames per second of the files of a run's clips: those at which its largest bucket takes frames, or the published
    networks' where it takes recorded frames at strides."""
    task = experiment.task
    return largest_bucket(task, experiment.data.buckets).frames_per_second or frames_per_second(task)


def sample_request(
    experiment: Experiment,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    enhance: EnhanceConfig | None = None,
    *,
    given: GivenFiles = NOTHING,
    given_frames: int | None = None,
) -> SampleRequest:
    """What to generate, with the run's own values for what is None; checked by the task.

    Args:
      experiment: its largest bucket gives frames and size.
      frames, size: frames, and (height, width), of a clip.
      steps, guidance, enhance: of the sampler.
      given: files that clips are made from; a video's length is that of the clips unless `frames` is given.
      given_frames: images that each clip is made from, where they are no files.

    Raises:
      ValueError: a request that the task cannot serve, or files that cannot be read or do not fit.
    """
    task = experiment.task
    largest = largest_bucket(task, experiment.data.buckets)
    height, width = (largest.height, largest.width) if size is None else size
    if frames is None:
        frames = given.size_of_video() or task.frames_of(largest)
    images = given.frames if given_frames is None else given_frames
    request = SampleRequest(frames, height, width, steps, guidance, enhance, images, given.strength_of_video)
    task.check_request(request)
    # Files that cannot be read or do not fit are told before weights are loaded.
    given.read(frames, (height, width), (0,))
    return request


def generate_in_batches(
    loaded: LoadedRun,
    generate: Generate,
    prompts: Sequence[str],
    wanted: Sequence[tuple[int, int]],
    batch: int,
    *,
    task: Task | None = None,
    frozen: Parameters | None = None,
    conditions: Any = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield `(index into wanted, pixels)` as soon as a batch is done, of the clips that are finite.

    Args:
      loaded: the run.
      generate: makes a batch.
      prompts: texts.
      wanted: prompt number and slot of every clip.
      batch: clips per batch; the last batch is filled with repeats, so that all have the shape that was compiled.
      task, frozen: instead of the run's own.
      conditions: host arrays, each with one row per wanted clip, whose rows `generate` gets last (cameras).

    Raises:
      NotFinite: after the last batch, or after one without a finite clip; see `jvgen.runs.faults`.
    """
    task = loaded.task if task is None else task
    frozen = loaded.frozen if frozen is None else frozen
    tokens = task.tokens(prompts)
    warn_of_truncated(task, prompts)

    @jax.jit
    def compiled(
        parameters: Parameters, frozen: Parameters, tokens: jax.Array, slots: jax.Array, *more: Any
    ) -> Generated:
        with loaded.program.tracing():
            return generate(task, parameters, frozen, tokens, slots, *more)

    parameters = loaded.compute_parameters()
    faults = Faults(loaded.experiment.training.precision.compute_dtype)
    for start in progress(range(0, len(wanted), batch), "sampling", unit="batches"):
        chosen = list(range(start, min(start + batch, len(wanted))))
        rows = [chosen[i % len(chosen)] for i in range(batch)]
        filled = [wanted[row] for row in rows]
        more = () if conditions is None else (jax.tree.map(lambda part, rows=rows: part[rows], conditions),)
        slots = jnp.asarray([slot for _, slot in filled], jnp.int32)
        made = jax.device_get(compiled(parameters, frozen, tokens[[prompt for prompt, _ in filled]], slots, *more))
        names = [clip_name(prompts, *wanted[index]) for index in chosen]
        for row in faults.finite_rows(names, made.finite):
            yield chosen[row], made.pixels[row]
        faults.stop_without_a_finite_clip()
    faults.raise_if_any()


def batch_for_devices(batch: int, clips: int, devices: int) -> int:
    """Clips per batch: at most as many as there are, rounded up to a multiple of the devices."""
    return -(-min(batch, clips) // devices) * devices


def clip_name(prompts: Sequence[str], prompt: int, slot: int) -> str:
    """A clip in messages."""
    return f"clip {slot % CLIPS_PER_PROMPT} of {prompts[prompt]!r}"


def slot_of(prompt: int, index: int) -> int:
    """The slot that the random draws of clip `index` of a prompt belong to."""
    return prompt * CLIPS_PER_PROMPT + index
