"""Sample clips from prompts with a trained run, as arrays or as files with an index; existing files are kept."""

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from einops import rearrange

from jvgen.autoencoding.decoder_swap import DecoderSwap
from jvgen.models.video_dit.enhance import EnhanceConfig
from jvgen.runs.clip_folder import is_one_file, note_clips, plan_clips, write_clip
from jvgen.runs.generation import batch_for_devices, clip_rate, generate_in_batches, sample_request, slot_of
from jvgen.runs.given_files import NOTHING, GivenFiles
from jvgen.runs.inference import LoadedRun, open_run, read_experiment, with_vae
from jvgen.storage import Path
from jvgen.tasks.task import SampleRequest
from jvgen.training.telemetry.throughput import peak_memory


def sample_run(
    run: Path,
    prompts: Sequence[str],
    out: Path,
    *,
    ema: str | None = None,
    step: int | None = None,
    count: int = 1,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    enhance: EnhanceConfig | None = None,
    seed: int = 0,
    batch: int = 8,
    untrained: bool = False,
    vae: Path | None = None,
    given: GivenFiles = NOTHING,
) -> list[Path]:
    """Generate `count` clips per prompt as files.

    Args:
      run: run directory of a text-to-video run.
      prompts: texts.
      out: folder for numbered mp4 files (png for single frames) and `index.jsonl`; or, for one clip, a file with such
        an ending.
      ema, step, untrained: which weights, see `jvgen.runs.inference.open_run`.
      frames, size: frames, and (height, width), of a clip; by default those of the run's largest bucket.
      steps, guidance, enhance: of the sampler; by default the run's.
      seed: clip i of prompt p depends on (seed, p, i) only, not on `batch` or on what exists.
      batch: clips per batch.
      vae: exported folder of another VAE to decode with, which shares the run's latents. A video VAE in place of an
        image VAE makes 4(n - 1) + 1 frames of n; an image VAE in place of a video VAE makes n. Of a run that names no
        VAE, that which made its latents.
      given: images or a video that clips are made from.

    Returns:
      The files, in order.

    Raises:
      ValueError: a request that the run cannot serve, or a folder with clips of another request.
      CheckpointError: no such run, or no valid checkpoint.
      NotFinite: clips that hold NaN or infinity; the others are written, see `jvgen.runs.faults`.
    """
    experiment = read_experiment(run)
    # Another VAE than the run's, or the only one.
    swapped = vae is not None and experiment.task.supports_sampling
    missing = None if swapped else vae
    experiment = with_vae(experiment, missing)
    request = sample_request(experiment, frames, size, steps, guidance, enhance, given=given)
    _check_given(given, len(prompts), vae if swapped else None)
    clips = plan_clips(prompts, count, out, frames=request.frames, batch=batch)
    if out.suffix == ".npy":
        raise ValueError(f"--out {out}: clips of a run are 8-bit pixels; name an .mp4 or .png file, or a folder.")
    asked = {
        "seed": seed, "ema": ema or "best", "untrained": untrained, "steps": steps, "guidance": guidance,
        "frames": request.frames, "height": request.height, "width": request.width,
    }  # fmt: skip
    asked |= given.digests()
    if vae is not None:
        asked["vae"] = str(vae)
    if enhance is not None:
        asked["enhance"] = json.loads(json.dumps(dataclasses.asdict(enhance)))
    swap = DecoderSwap(vae, experiment.task) if swapped else None
    loaded = open_run(run, ema, step, untrained, vae=missing)
    asked["step"] = loaded.step
    if not is_one_file(out):
        note_clips(out, [{"file": clip.path.name, "prompt": prompts[clip.prompt], **asked} for clip in clips])
    out.parent.mkdir(parents=True, exist_ok=True)
    todo = [clip for clip in clips if not clip.path.exists()]
    if todo:
        began = time.perf_counter()
        wanted = [(clip.prompt, clip.slot) for clip in todo]
        for index, pixels in _generate(loaded, prompts, wanted, request, seed, batch, swap, given):
            write_clip(todo[index].path, pixels, clip_rate(experiment))
        took = time.perf_counter() - began
        print(f"{len(todo)} clips in {took:.1f} s ({took / len(todo):.2f} s/clip, compilation included) in {out}")
        print(f"peak memory: {peak_memory(loaded.program.sharding.mesh.devices.flat[0])}")
    if len(todo) < len(clips):
        print(f"{len(clips) - len(todo)} clips existed already in {out}")
    return [clip.path for clip in clips]


def sample_arrays(
    loaded: LoadedRun,
    prompts: Sequence[str],
    *,
    count: int = 1,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    enhance: EnhanceConfig | None = None,
    seed: int = 0,
    batch: int = 8,
    vae: Path | None = None,
    given: GivenFiles = NOTHING,
) -> np.ndarray:
    """Generate `count` clips per prompt: uint8 `P C F H W 3` for P prompts and C clips of each.

    Arguments are those of `sample_run`; the same seed gives the same clips.

    Raises:
      ValueError: a request that the run cannot serve.
      NotFinite: clips that hold NaN or infinity.
    """
    request = sample_request(loaded.experiment, frames, size, steps, guidance, enhance, given=given)
    _check_given(given, len(prompts), vae)
    swap = None if vae is None else DecoderSwap(vae, loaded.experiment.task)
    wanted = [(prompt, slot_of(prompt, index)) for prompt in range(len(prompts)) for index in range(count)]
    clips = [pixels for _, pixels in _generate(loaded, prompts, wanted, request, seed, batch, swap, given)]
    return rearrange(np.stack(clips), "(p c) f h w x -> p c f h w x", c=count)


def _generate(
    loaded: LoadedRun,
    prompts: Sequence[str],
    wanted: Sequence[tuple[int, int]],
    request: SampleRequest,
    seed: int,
    batch: int,
    swap: DecoderSwap | None,
    given: GivenFiles,
) -> Iterator[tuple[int, np.ndarray]]:
    task, frozen, key = loaded.task, loaded.frozen, jax.random.key(seed)
    if swap is not None:
        weights = jax.device_put(swap.load(), loaded.program.sharding.replicated)
        task, frozen = swap.apply_to(task), {**frozen, "vae": weights}
    batch = batch_for_devices(batch, len(wanted), loaded.devices)
    pixels = given.read(request.frames, (request.height, request.width), [prompt for prompt, _ in wanted])
    return generate_in_batches(
        loaded,
        lambda task, parameters, frozen, tokens, slots, given=None: task.generate(
            parameters, frozen, tokens, slots, key, request, given
        ),
        prompts, wanted, batch, task=task, frozen=frozen, conditions=pixels,
    )  # fmt: skip


def _check_given(given: GivenFiles, prompts: int, vae: Path | None) -> None:
    given.check_count(prompts, "prompts")
    if vae is not None and (given.images or given.video):
        raise ValueError("--vae: not valid with --image or --video, which are encoded with the run's own VAE.")
