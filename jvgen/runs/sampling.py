"""Clips from prompts with a trained run, written as files beside an index; what is already there is not made again."""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jvgen.models.video_dit.enhance import EnhanceConfig
from jvgen.nn.network import Parameters
from jvgen.parallel import axes
from jvgen.runs.clip_folder import Clip, is_one_file, note_clips, plan_clips, write_clip
from jvgen.runs.inference import TrainedRun, open_run, read_experiment
from jvgen.tasks.other_decoder import OtherDecoder
from jvgen.tasks.task import SampleRequest, Task
from jvgen.terminal import progress
from jvgen.training.experiment import Experiment
from jvgen.training.telemetry.throughput import peak_memory

FRAMES_PER_SECOND = 8


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
) -> list[Path]:
    """Generate `count` clips a prompt.

    Args:
      run: work folder of a text-to-video run.
      prompts: texts.
      out: folder for numbered mp4 files (png for single frames) and `index.jsonl`; or one file with such an ending, for
        one clip.
      ema, step, untrained: which weights, see `jvgen.runs.inference.open_run`.
      frames, size: frames, and (height, width), of the clips; those of the run's largest bucket if not given.
      steps, guidance, enhance: of the sampler; the run's if not given.
      seed: clip i of prompt p depends on (seed, p, i) only, not on `batch` or on what was made before.
      batch: clips made together.
      vae: exported folder of an autoencoder that shares its latents with the run's, to decode with: where the run knows
        images and this one clips, n frames that the run makes become 4(n - 1) + 1; the other way round they are n.

    Returns:
      The files, in order.

    Raises:
      ValueError: a request that the run cannot serve, or clips of another request in the way.
      CheckpointError: no such run, or no sound checkpoint.
    """
    request = _request(read_experiment(run), frames, size, steps, guidance, enhance)
    clips = plan_clips(prompts, count, out, frames=request.frames, batch=batch)
    if out.suffix == ".npy":
        raise ValueError(f"--out {out}: clips of a run are pixels of 8 bits; name an .mp4 or .png file, or a folder.")
    asked = {
        "seed": seed, "ema": ema or "best", "untrained": untrained, "steps": steps, "guidance": guidance,
        "frames": request.frames, "height": request.height, "width": request.width,
    }  # fmt: skip
    if vae is not None:
        asked["vae"] = str(vae)
    if enhance is not None:
        asked["enhance"] = json.loads(json.dumps(dataclasses.asdict(enhance)))
    other = None if vae is None else OtherDecoder(vae, read_experiment(run).task)
    loaded = open_run(run, ema, step, untrained)
    asked["step"] = loaded.step
    if not is_one_file(out):
        note_clips(out, [{"file": clip.path.name, "prompt": prompts[clip.prompt], **asked} for clip in clips])
    out.parent.mkdir(parents=True, exist_ok=True)
    todo = [clip for clip in clips if not clip.path.exists()]
    if todo:
        task, frozen = loaded.task, loaded.frozen
        if other is not None:
            weights = jax.device_put(other.load(), loaded.program.sharding.replicated)
            task, frozen = other.of(task), {**frozen, "vae": weights}
        took = _make(loaded, task, frozen, prompts, todo, jax.random.key(seed), request, batch)
        print(f"{len(todo)} clips in {took:.1f} s ({took / len(todo):.2f} s a clip, compilation included) in {out}")
        print(f"peak memory: {peak_memory(loaded.program.sharding.mesh.devices.flat[0])}")
    if len(todo) < len(clips):
        print(f"{len(clips) - len(todo)} clips were there already in {out}")
    return [clip.path for clip in clips]


def _request(
    experiment: Experiment,
    frames: int | None,
    size: tuple[int, int] | None,
    steps: int | None,
    guidance: float | None,
    enhance: EnhanceConfig | None,
) -> SampleRequest:
    """What is asked for, with the run's own values where nothing is said; checked by the task."""
    largest = max(experiment.data.buckets, key=lambda bucket: (bucket.frames, bucket.height * bucket.width))
    height, width = (largest.height, largest.width) if size is None else size
    frames = experiment.task.frames_of(largest) if frames is None else frames
    request = SampleRequest(frames, height, width, steps, guidance, enhance)
    experiment.task.check_request(request)
    return request


def _make(
    loaded: TrainedRun,
    task: Task,
    frozen: Parameters,
    prompts: Sequence[str],
    todo: Sequence[Clip],
    key: jax.Array,
    request: SampleRequest,
    batch: int,
) -> float:
    """Make clips and write each as soon as its batch is done; returns seconds."""
    sharding = loaded.program.sharding
    tokens = task.tokens(prompts)
    batch = -(-min(batch, len(todo)) // loaded.devices) * loaded.devices

    @jax.jit
    def generate(parameters: Parameters, frozen: Parameters, tokens: jax.Array, slots: jax.Array) -> jax.Array:
        with axes.partitioned(sharding):
            return task.generate(parameters, frozen, tokens, slots, key, request)

    began, parameters = time.perf_counter(), loaded.compute_parameters()
    for start in progress(range(0, len(todo), batch), "sampling", unit="batches"):
        chosen = todo[start : start + batch]
        # The last batch is filled up with repeats, so that every batch has the shape that was compiled.
        filled = [chosen[i % len(chosen)] for i in range(batch)]
        slots = np.array([clip.slot for clip in filled], np.int32)
        made = generate(parameters, frozen, tokens[[clip.prompt for clip in filled]], jnp.asarray(slots))
        for clip, pixels in zip(chosen, np.asarray(made), strict=False):
            write_clip(clip.path, pixels, FRAMES_PER_SECOND)
    return time.perf_counter() - began
