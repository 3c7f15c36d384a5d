"""`jvgen sample --weights`: prompts to clips with a published pipeline, network after network."""

import dataclasses
import hashlib
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jvgen.config import Config
from jvgen.diffusion.guidance import GuidanceConfig
from jvgen.diffusion.objective import slot_normal
from jvgen.diffusion.sampler import SamplerConfig, first_step
from jvgen.finite import Finite, clips_of
from jvgen.interop.digest import file_digest
from jvgen.interop.from_torch import check_weights
from jvgen.interop.lora_folder import adapter_files, read_adapters
from jvgen.models.cogvideox_vae.tiling import Tiling
from jvgen.models.video_dit.enhance import EnhanceConfig
from jvgen.nn import lora
from jvgen.nn.network import Parameters
from jvgen.runs.clip_folder import Clip, Naming, is_one_file, note_clips, plan_clips, write_clip
from jvgen.runs.faults import Faults
from jvgen.runs.generation import clip_name
from jvgen.runs.given_files import NOTHING, GivenFiles
from jvgen.runs.noise import read_noise
from jvgen.runs.prompts import warn_of_truncated
from jvgen.runs.published.placement import Placement, default_dtype
from jvgen.runs.published.stages import Batch, Decoder, Denoiser, GivenMoments, encode_captions, encode_given
from jvgen.saved_config import to_json
from jvgen.storage import Path, local_copy, resolved
from jvgen.tasks.clip_sampling import START_KEY, enhancement_hook
from jvgen.tasks.given_frames import GivenPixels
from jvgen.tasks.pipeline_folder import DENOISER, default_request, frames_per_second, pipeline_weights, read_pipeline
from jvgen.tasks.pixels import to_clips
from jvgen.tasks.task import SampleRequest
from jvgen.tasks.text_to_video import TextToVideo, TextToVideoConfig
from jvgen.terminal import progress_bar
from jvgen.training.telemetry.throughput import peak_memory

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedRequest:
    """What `jvgen sample --weights` is asked for; None leaves it to the pipeline.

    Attributes:
      frames, size, steps, guidance: of the clips; size is (height, width) in pixels. Guidance of 1 or less is none.
      dynamic_guidance: CogVideoX's scale that changes with the timestep.
      sampler, spacing: kind and spacing of `SamplerConfig`; the pipeline's scheduler if None.
      levels: see `SamplerConfig`; "sat" has a spacing of its own.
      negative_prompt: what guidance leads away from.
      null: what stands for no prompt: the embeddings of the negative prompt, or zeros (as CogVideoX was trained).
      seed: clip i of prompt p depends on (seed, p, i) only.
      batch: clips denoised together.
      noise: file with the noise to start from, see `read_noise`.
      dtype: "float32", "bfloat16" or "float16".
      in_tiles: decode tile by tile.
      frames_per_second: of the files.
      devices: how many of this machine's to use; all if None.
      enhance: scaling of attention across frames.
      variant: of the pipeline's files, such as "fp16".
      loras: files or folders of adapters of the denoiser and of the text encoder, each with a factor on its updates.
      lora_unmerged: keep them beside the weights instead of merging them into these.
      given: images or a video that clips are made from.
    """

    frames: int | None = None
    size: tuple[int, int] | None = None
    steps: int | None = None
    guidance: float | None = None
    dynamic_guidance: bool = False
    sampler: str | None = None
    spacing: str | None = None
    levels: Literal["schedule", "sat"] = "schedule"
    negative_prompt: str = ""
    null: Literal["empty", "zeros"] = "empty"
    seed: int = 0
    batch: int = 1
    noise: Path | None = None
    dtype: str | None = None
    in_tiles: bool = False
    frames_per_second: float | None = None
    devices: int | None = None
    enhance: EnhanceConfig | None = None
    variant: str | None = None
    loras: tuple[tuple[Path, float], ...] = ()
    lora_unmerged: bool = False
    given: GivenFiles = NOTHING


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A request that was found possible: nothing is loaded yet.

    Attributes:
      config: the pipeline as a task.
      clip: size of the clips.
      sampler, guidance: how they are made.
      latents: frames, height, width and channels that are sampled.
      noise: see `read_noise`; None to draw it.
      dtype: see `PublishedRequest`.
      adapters: for each network with LoRA adapters all those of the request as one, with their scales in it.
      given: pixels of the images, one row for all prompts or one per prompt, or of the video; None for none.
    """

    config: TextToVideoConfig
    clip: SampleRequest
    sampler: SamplerConfig
    guidance: GuidanceConfig
    latents: tuple[int, int, int, int]
    noise: np.ndarray | None
    dtype: str
    adapters: Mapping[str, Parameters] = dataclasses.field(default_factory=dict)
    given: GivenPixels | None = None

    @property
    def first(self) -> int:
        """The sampler's first step: a given video begins later than pure noise."""
        return 0 if self.clip.strength is None else first_step(self.sampler.steps, self.clip.strength)


def sample_published(
    weights: Path,
    prompts: Sequence[str],
    out: Path,
    request: PublishedRequest,
    *,
    count: int = 1,
    naming: Naming = "numbered",
) -> list[Path]:
    """Generate `count` clips a prompt; clips that are there already are not made again.

    Args:
      weights: folder of a pipeline, see `read_pipeline`.
      prompts: texts, each once.
      out: folder for the clips and `index.jsonl`, or one file for one clip: .mp4, .png, or .npy for float32 frames in
        0..1 as the decoder gives them.
      request: see `PublishedRequest`.
      count: clips a prompt.
      naming: of files in a folder.

    Returns:
      The files, in order.

    Raises:
      ValueError: everything that can be known to be wrong before weights are read.
      NotFinite: clips that hold NaN or infinity; the others are written, see `jvgen.runs.faults`.
    """
    given, weights = weights, local_copy(weights)
    request.given.check_count(len(prompts), "prompts")
    prepared = prepare(weights, len(prompts) * count, request)
    clip = prepared.clip
    clips = plan_clips(prompts, count, out, frames=clip.frames, batch=request.batch, naming=naming)
    for path in pipeline_weights(weights, request.variant).values():
        check_weights(path)
    if not is_one_file(out):
        made = _settings(given, prepared, request)
        note_clips(out, [{"file": c.path.name, "prompt": prompts[c.prompt], "slot": c.slot, **made} for c in clips])
    out.parent.mkdir(parents=True, exist_ok=True)
    todo = [(number, clip) for number, clip in enumerate(clips) if not clip.path.exists()]
    if todo:
        _make(weights, prompts, todo, prepared, request)
    if len(todo) < len(clips):
        print(f"{len(clips) - len(todo)} clips were there already in {out}")
    return [clip.path for clip in clips]


def prepare(weights: Path, clips: int, request: PublishedRequest) -> Prepared:
    """Check a request against a pipeline; reads small files only.

    Raises:
      ValueError: a pipeline that cannot be read, or a request that it cannot serve.
    """
    if request.dtype not in (None, *DTYPES):
        raise ValueError(f"--dtype {request.dtype}: one of {', '.join(DTYPES)}.")
    if request.null == "zeros" and request.negative_prompt:
        raise ValueError("--unconditional zeros replaces the embedding of --negative-prompt: give one of them.")
    if request.frames_per_second is not None and not request.frames_per_second > 0:
        raise ValueError(f"--fps {request.frames_per_second}: must be more than 0.")
    available = len(jax.local_devices())
    if request.devices is not None and not 1 <= request.devices <= available:
        raise ValueError(f"--devices {request.devices}: this machine has {available}.")
    config = read_pipeline(weights, request.variant)
    if config.condition != "none" and request.given.last_images:
        # Which frames the network was trained with is in no file.
        config = config.replace(condition="first_and_last")
    asked = {"kind": request.sampler, "spacing": request.spacing}
    asked = {name: value for name, value in asked.items() if value is not None}
    if request.levels == "sat":
        asked = {"spacing": "trailing", "step_to": "next", "levels": "sat"} | asked
    config = config.replace(sampler=config.sampler.replace(**asked))
    if request.dynamic_guidance:
        config = config.replace(guidance=config.guidance.replace(kind="dynamic"))
    made_for = default_request(config)
    height, width = (made_for.height, made_for.width) if request.size is None else request.size
    guidance = config.guidance.scale if request.guidance is None else request.guidance
    clip = SampleRequest(
        frames=request.frames or request.given.size_of_video() or made_for.frames,
        height=height,
        width=width,
        steps=request.steps,
        # As diffusers has it: what is not more than 1 is a single pass.
        guidance=guidance if guidance > 1 else 1.0,
        enhance=request.enhance,
        given_frames=request.given.frames,
        strength=request.given.strength_of_video,
    )
    config.check_request(clip)
    if request.in_tiles:
        Tiling.decoding(config.vae)
    sampler, strength = config.sampling(clip)
    latents = (*config.denoised_shape(clip.frames, height, width), config.denoiser.out_channels)
    noise = None if request.noise is None else read_noise(request.noise, latents, clips)
    if request.lora_unmerged and not request.loras:
        raise ValueError("--lora-unmerged: needs --lora FILE.")
    adapters = _combined(request, config)
    dtype = request.dtype or default_dtype()
    given = request.given.read(clip.frames, (height, width), range(max(len(request.given.images), 1)))
    return Prepared(config, clip, sampler, strength, latents, noise, dtype, adapters, given)


def _settings(weights: Path, prepared: Prepared, request: PublishedRequest) -> dict[str, Any]:
    """Everything that decides what a clip of a prompt looks like, for the index."""
    config, clip, sampler, guidance = prepared.config, prepared.clip, prepared.sampler, prepared.guidance
    noise = prepared.noise
    return {
        "weights": str(resolved(weights)), "seed": request.seed, "frames": clip.frames, "height": clip.height,
        "width": clip.width, "sampler": sampler.kind, "spacing": sampler.spacing, "levels": sampler.levels,
        "steps": sampler.steps, "guidance": guidance.kind,
        "scale": guidance.scale, "negative_prompt": request.negative_prompt, "null": request.null,
        "dtype": prepared.dtype, "in_tiles": request.in_tiles,
        "enhance": None if request.enhance is None else json.loads(to_json(request.enhance)),
        "noise": None if noise is None else hashlib.sha256(np.ascontiguousarray(noise)).hexdigest(),
        # Folders of clips that were made without this field are gone on with.
        **({} if request.variant is None else {"variant": request.variant}),
        **({"lora": [[*_named(path, config), scale] for path, scale in request.loras]} if request.loras else {}),
        **({"lora_unmerged": True} if request.lora_unmerged else {}),
        **request.given.digests(),
    }  # fmt: skip


def _networks(config: TextToVideoConfig) -> dict[str, Config]:
    """The networks of a pipeline that may have LoRA adapters."""
    return {"denoiser": config.denoiser, "text_encoder": config.text.encoder}


def _combined(request: PublishedRequest, config: TextToVideoConfig) -> dict[str, Parameters]:
    """The adapters of a request by network, those of one network as one."""
    found: dict[str, list[tuple[Parameters, float]]] = {}
    for path, scale in request.loras:
        for name, adapter in read_adapters(path, _networks(config)).items():
            if adapter.absent:
                blocks = sorted({block for absent in adapter.absent.values() for block in absent})
                listed = ", ".join(map(str, blocks))
                print(f"{path}: has no LoRA for layers of the blocks {listed} of the {name}, which stay as they are")
            found.setdefault(name, []).append((adapter.factors, adapter.scale * scale))
    return {name: lora.combined(adapters) for name, adapters in found.items()}


def _named(path: Path, config: TextToVideoConfig) -> tuple[str, str]:
    """Path and content hash of an adapter: one that is trained further is written under the same name."""
    files = adapter_files(path, _networks(config)).values()
    return str(resolved(path)), "+".join(file_digest(local_copy(file)) for file in files)


def _make(
    weights: Path,
    prompts: Sequence[str],
    todo: Sequence[tuple[int, Clip]],
    prepared: Prepared,
    request: PublishedRequest,
) -> None:
    """Make clips and write each as soon as its batch is done; `todo` has the number of each clip among all."""
    began = time.perf_counter()
    batch = min(request.batch, len(todo))
    placement = Placement.of(batch, jnp.dtype(prepared.dtype), jax.local_devices()[: request.devices])
    denoiser_config = prepared.config.denoiser.replace(token_multiple=placement.devices_a_clip)
    task = prepared.config.replace(denoiser=denoiser_config).build()
    wanted = [prompts[clip.prompt] for _, clip in todo]
    warn_of_truncated(task, [*wanted, request.negative_prompt])
    embeddings = encode_captions(
        task, [*wanted, request.negative_prompt], placement, prepared.adapters.get("text_encoder"),
        unmerged=request.lora_unmerged,
    )  # fmt: skip
    empty = embeddings[request.negative_prompt]
    if request.null == "zeros":
        empty = np.zeros_like(empty)
    moments = encode_given(task, prepared.given, placement)
    encoded = time.perf_counter()
    scale = enhancement_hook(task.config, task.schedule, request.enhance, prepared.sampler, prepared.guidance)
    network = pipeline_weights(weights, request.variant)[DENOISER]
    denoiser = Denoiser(
        task, network, placement, prepared.sampler, prepared.guidance, scale, prepared.adapters.get("denoiser"),
        unmerged=request.lora_unmerged, first=prepared.first,
    )  # fmt: skip
    decoder = Decoder(task, placement, in_tiles=request.in_tiles)
    rate = request.frames_per_second or frames_per_second(prepared.config)
    loaded = time.perf_counter()
    steps_of_clip = prepared.sampler.steps - prepared.first
    steps, total = [], -(-len(todo) // batch) * steps_of_clip
    faults = Faults(prepared.dtype, "--dtype")
    decoding = 0.0
    with progress_bar("sampling", unit="steps") as report:
        for begin in range(0, len(todo), batch):
            chosen = todo[begin : begin + batch]
            # The last batch is filled up with repeats, so that every batch has the shape that was compiled.
            filled = [chosen[index % len(chosen)] for index in range(batch)]
            inputs = _inputs(filled, prompts, embeddings, empty, prepared, request, task, moments)
            before, finite_steps = time.perf_counter(), np.zeros(batch, np.int32)
            for reached, finite in denoiser(inputs, jax.random.key(request.seed)):
                latents, finite_steps = reached, finite_steps + finite
                now = time.perf_counter()
                steps.append(now - before)
                before = now
                report(len(steps), total)
                if not finite.any():
                    break
            finite = Finite(np.ones(batch, bool), finite_steps, np.ones(batch, bool), np.int32(steps_of_clip))
            if finite.all().any():
                latents = latents[:, -prepared.config.clip_frames(prepared.clip.frames) :]
                finite, frames = _decode(decoder, latents, finite, as_floats=chosen[0][1].path.suffix == ".npy")
            names = [clip_name(prompts, clip.prompt, clip.slot) for _, clip in chosen]
            for row in faults.finite_rows(names, finite):
                write_clip(chosen[row][1].path, frames[row], rate)
            faults.stop_without_a_finite_clip()
            decoding += time.perf_counter() - before
    whole = time.perf_counter() - began
    print(
        f"{len(todo)} clips of {prepared.clip.frames}x{prepared.clip.height}x{prepared.clip.width} in {whole:.1f} s: "
        f"captions {encoded - began:.1f} s, loading {loaded - encoded:.1f} s, {len(steps)} steps of "
        f"{statistics.median(steps[1:] or steps):.3g} s (median; the first, with its compilation, {steps[0]:.1f} s), "
        f"decoding {decoding:.1f} s"
    )
    print(f"peak memory: {peak_memory(placement.sharding.mesh.devices.flat[0])}")
    faults.raise_if_any()


def _inputs(
    filled: Sequence[tuple[int, Clip]],
    prompts: Sequence[str],
    embeddings: Mapping[str, np.ndarray],
    empty: np.ndarray,
    prepared: Prepared,
    request: PublishedRequest,
    task: TextToVideo,
    moments: GivenMoments,
) -> Batch:
    slots = np.array([clip.slot for _, clip in filled], np.int32)
    if prepared.noise is None:
        key = jax.random.fold_in(jax.random.key(request.seed), START_KEY)
        start = slot_normal(key, (len(filled), *prepared.latents), jnp.asarray(slots))
    else:
        start = jnp.asarray(prepared.noise[[number for number, _ in filled]])
    text = np.stack([embeddings[prompts[clip.prompt]] for _, clip in filled])
    key, condition, video = jax.random.key(request.seed), None, None
    if moments.frames is not None:
        rows = [clip.prompt if len(moments.frames) > 1 else 0 for _, clip in filled]
        given = jnp.asarray(moments.frames[rows])
        condition = task.given.condition_of_moments(given, key, jnp.asarray(slots), prepared.latents[0])
    if moments.video is not None:
        video = jnp.broadcast_to(jnp.asarray(moments.video), (len(filled), *moments.video.shape))
    start, _ = task.given.start(video, start, key, jnp.asarray(slots), prepared.sampler, prepared.clip.strength)
    return Batch(
        text=text, empty=np.stack([empty] * len(filled)), start=start, slots=slots, condition=condition
    )  # fmt: skip


def _decode(decoder: Decoder, latents: jax.Array, finite: Finite, *, as_floats: bool) -> tuple[Finite, np.ndarray]:
    """Frames `B F H W 3` of a batch, and which of its clips are finite."""
    convert = _to_unit_clips if as_floats else _to_clips
    pieces = [jax.device_get(convert(frames)) for frames in decoder(latents)]
    pixels = np.all([piece.finite for piece in pieces], axis=0)
    return finite._replace(pixels=pixels), np.concatenate([piece.pixels for piece in pieces], axis=1)


_to_clips = jax.jit(to_clips)
_to_unit_clips = jax.jit(lambda values: clips_of(values, _to_unit))


def _to_unit(values: jax.Array) -> jax.Array:
    """-1..1 to float32 in 0..1, clipped."""
    return jnp.clip(values.astype(jnp.float32) / 2 + 0.5, 0, 1)
