"""Clips that a run generates for held-out captions and cameras, beside the recorded ones."""

import dataclasses
from typing import Any

import jax
import numpy as np

from jvgen.data.stream.loader import Loader
from jvgen.finite import not_finite
from jvgen.geometry.cameras import Cameras
from jvgen.runs.generation import batch_for_devices, generate_in_batches, largest_bucket, sample_request, slot_of
from jvgen.runs.inference import LoadedRun
from jvgen.runs.view_sampling import fitting_batch
from jvgen.tasks.given_frames import GivenPixels, of_clip
from jvgen.tasks.task import SampleRequest, Task
from jvgen.training.state import EVALUATE, key_for

CAPTION, RATE = "caption_bytes", "recorded_rate"
_CAPTION_BYTES = 4096


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Recorded clips with what the run generates others from.

    Attributes:
      clips: uint8 `N F H W 3`, or `N V F H W 3`; decoded from cached latents where the data set has no pixels.
      captions: one per clip or set of views.
      cameras: `N V F 4` and `N V F 3 4`; None for single clips.
      given: frames that clips are conditioned on, as recorded, uint8 `N K H W 3` or `N V K H W 3`; None without such.
      frames_per_second: median rate of the clips, at the stride that the run takes of the recordings; None for images,
        and where the data set does not say it.
    """

    clips: np.ndarray
    captions: tuple[str, ...]
    cameras: Cameras | None
    given: np.ndarray | None = None
    frames_per_second: float | None = None

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height and width of a clip."""
        return self.clips.shape[-4:-1]


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How clips to be measured are generated.

    Attributes:
      samples: number of clips, or of sets of views; 0 for none.
      steps, guidance: of the sampler; None for the run's own.
      seed: of the random numbers.
      batch: clips, or sets of views, per batch.
    """

    samples: int = 0
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    batch: int = 8


def with_caption(task: Task, example: dict[str, Any]) -> dict[str, np.ndarray]:
    """`task.preprocess`, the caption as UTF-8 bytes with zeros behind them, and the frame rate."""
    text = example.get("caption", "").encode()[:_CAPTION_BYTES]
    caption = np.frombuffer(text.ljust(_CAPTION_BYTES, b"\0"), np.uint8)
    return {**task.preprocess(example), CAPTION: caption, RATE: np.float32(example["frames_per_second"])}


def read_held_out(loaded: LoadedRun, loader: Loader, count: int) -> HeldOut:
    """The first clips of the evaluation data, none twice; fewer than `count` if there are no more. All are of the
    largest size that the data has for the run, the one that `jvgen sample` makes.

    Args:
      loader: of evaluation data, with `with_caption`.

    Raises:
      ValueError: no clips that the run can generate others like: of several views, none with cameras.
    """
    views = loaded.experiment.task.supports_views
    buckets = [one for one in loader.buckets if not views or "extrinsics" in loaded.task.fields(one)]
    if not buckets:
        raise ValueError("--samples: the evaluation data has no clips with cameras, from which views are generated.")
    bucket = largest_bucket(loaded.experiment.task, buckets)
    clips: list[np.ndarray] = []
    captions: list[str] = []
    rates: list[float] = []
    cameras: list[Cameras] = []
    given: list[np.ndarray] = []
    condition = getattr(loaded.experiment.task, "condition", "none")
    seen: set[str] = set()
    # Records start again when all were read.
    with loader.batches(0, None) as stream:
        for step, batch in enumerate(stream):
            if batch.bucket != bucket:
                continue
            new = []
            for row, name in enumerate(batch.record_ids):
                if name not in seen:
                    seen.add(name)
                    new.append(row)
            pixels = _pixels(loaded, batch.arrays, batch.bucket, step)
            for row in new[: count - len(clips)]:
                clips.append(pixels[row])
                captions.append(bytes(batch.arrays[CAPTION][row]).rstrip(b"\0").decode(errors="ignore"))
                rates.append(float(batch.arrays[RATE][row]))
                if condition != "none":
                    frames = batch.arrays.get("given")
                    clip = pixels[row]
                    given.append(of_clip(clip, condition, clip.ndim - 4) if frames is None else frames[row])
                if views:
                    cameras.append(Cameras(*(batch.arrays[name][row] for name in ("intrinsics", "extrinsics"))))
            if len(clips) >= count or len(new) < len(batch.record_ids):
                break
    joined = Cameras(*(np.stack(parts) for parts in zip(*cameras, strict=True))) if cameras else None
    return HeldOut(
        np.stack(clips), tuple(captions), joined, np.stack(given) if given else None,
        float(np.median(rates)) if min(rates) > 0 else None,
    )  # fmt: skip


def _pixels(loaded: LoadedRun, arrays: dict[str, np.ndarray], bucket: Any, step: int) -> np.ndarray:
    if "video" in arrays:
        return arrays["video"]
    placed = loaded.program.shard_batch(arrays, bucket)
    key = key_for(jax.random.key(loaded.experiment.seed), EVALUATE, step)
    decoded = np.asarray(loaded.program.evaluation("recorded_clips")(loaded.parameters, loaded.frozen, placed, key))
    if not np.isfinite(decoded).all():
        raise not_finite("clips of recorded latents", "VAE", loaded.experiment.training.precision.compute_dtype)
    return np.rint(decoded * 255.0).astype(np.uint8)


def generate_clips(loaded: LoadedRun, held_out: HeldOut, options: SamplingOptions) -> np.ndarray:
    """One clip per held-out caption, uint8 `N F H W 3`, by the run's own sampler."""
    request, key = _request(loaded, held_out, options), jax.random.key(options.seed)
    wanted = [(number, slot_of(number, 0)) for number in range(len(held_out.captions))]
    batch = batch_for_devices(options.batch, len(wanted), loaded.devices)
    made = generate_in_batches(
        loaded,
        lambda task, parameters, frozen, tokens, slots, given=None: task.generate(
            parameters, frozen, tokens, slots, key, request, given
        ),
        held_out.captions, wanted, batch, conditions=_given(held_out),
    )  # fmt: skip
    return _in_order(made)


def generate_views(loaded: LoadedRun, held_out: HeldOut, options: SamplingOptions) -> tuple[np.ndarray, np.ndarray]:
    """Views for the held-out captions and cameras, and again with all views at the first view's cameras.

    Both uint8 `N V F H W 3`.
    """
    request, key = _request(loaded, held_out, options), jax.random.key(options.seed)
    count, views = held_out.cameras.intrinsics.shape[:2]
    equal = (np.repeat(part[:, :1], views, axis=1) for part in held_out.cameras)
    both = Cameras(*(np.concatenate(parts).astype(np.float32) for parts in zip(held_out.cameras, equal, strict=True)))
    wanted = [(number, slot_of(number, kind)) for kind in range(2) for number in range(count)]
    least = fitting_batch(None, views, loaded.devices)
    batch = -(-min(options.batch, len(wanted)) // least) * least
    made = generate_in_batches(
        loaded,
        lambda task, parameters, frozen, tokens, slots, more: task.generate_views(
            parameters, frozen, tokens, more[0], slots, key, request, more[1]
        ),
        held_out.captions, wanted, batch, conditions=(both, _given(held_out, copies=2)),
    )  # fmt: skip
    found = _in_order(made)
    return found[:count], found[count:]


def _given(held_out: HeldOut, copies: int = 1) -> GivenPixels | None:
    """What clips are made from beside captions, `copies` times one after another."""
    return None if held_out.given is None else GivenPixels(frames=np.concatenate([held_out.given] * copies))


def _in_order(made: Any) -> np.ndarray:
    return np.stack([pixels for _, pixels in sorted(made, key=lambda pair: pair[0])])


def _request(loaded: LoadedRun, held_out: HeldOut, options: SamplingOptions) -> SampleRequest:
    frames, *size = held_out.size
    return sample_request(
        loaded.experiment, frames, tuple(size), options.steps, options.guidance,
        given_frames=getattr(loaded.experiment.task, "given_frames", 0),
    )  # fmt: skip
