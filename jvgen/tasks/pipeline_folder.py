"""Folders of CogVideoX pipelines saved by diffusers, read as the configuration of a text-to-video task."""

import numpy as np

from jvgen.config import validate_tree
from jvgen.diffusion.guidance import GuidanceConfig
from jvgen.diffusion.objective import ObjectiveConfig
from jvgen.diffusion.schedule import alpha_bar_table
from jvgen.interop import schedulers
from jvgen.interop.architecture import differences
from jvgen.interop.file_digests import check_digests
from jvgen.interop.from_torch import read_config, with_variant
from jvgen.models.cogvideox_vae.config import CogVideoXVAEConfig
from jvgen.models.t5 import tokenizer
from jvgen.models.t5.config import T5Config
from jvgen.models.video_dit.config import VideoDiTConfig
from jvgen.storage import Path, read_json_object
from jvgen.tasks.given_frames import Condition, check_condition
from jvgen.tasks.task import SampleRequest, TaskConfig
from jvgen.tasks.text import TextConfig
from jvgen.tasks.text_to_video import TextToVideoConfig

INDEX = "model_index.json"
PIPELINE = "CogVideoXPipeline"
IMAGE_PIPELINE = "CogVideoXImageToVideoPipeline"
# Classes in diffusers that hold these networks, and whether their denoiser takes the latents of an image.
PIPELINES = {PIPELINE: False, "CogVideoXVideoToVideoPipeline": False, IMAGE_PIPELINE: True}
DENOISER, VAE, TEXT_ENCODER, TOKENIZER = "transformer", "vae", "text_encoder", "tokenizer"
SCHEDULER_FILE = "scheduler/scheduler_config.json"
NETWORKS = {DENOISER: VideoDiTConfig, VAE: CogVideoXVAEConfig, TEXT_ENCODER: T5Config}

# The config.json of CogVideoX1.5 (patches of several frames) has the maximum grid and not the clip size of the network.
DEFAULT_REQUEST_1_5 = SampleRequest(frames=81, height=768, width=1360)
FRAMES_PER_SECOND, FRAMES_PER_SECOND_1_5 = 8, 16


def is_pipeline(folder: Path) -> bool:
    """Whether a folder contains a pipeline (complete or not), instead of single networks.

    The index of an export that is no pipeline names no class of one, and a world model has a transformer too.
    """
    if (folder / INDEX).is_file() and "_class_name" in read_json_object(folder / INDEX):
        return True
    config = folder / DENOISER / "config.json"
    return config.is_file() and read_json_object(config).get("_class_name") == "CogVideoXTransformer3DModel"


def pipeline_weights(folder: Path, variant: str | None = None) -> dict[str, Path]:
    """Where the weights of each network of a pipeline are: its subfolder, or the file of the variant in it.

    As in diffusers, networks that have no such variant are read without it.

    Raises:
      ValueError: no network has the variant.
    """
    paths, problems = {}, []
    for name in NETWORKS:
        paths[name] = folder / name
        try:
            paths[name] = with_variant(folder / name, variant)
        except ValueError as error:
            problems.append(error)
    if len(problems) == len(paths):
        raise problems[0]
    return paths


def read_pipeline(folder: Path, variant: str | None = None) -> TextToVideoConfig:
    """The task with the networks, text encoder, noise schedule and sampler of a pipeline folder.

    Reads no weights.

    Args:
      folder: with `transformer`, `vae`, `text_encoder`, `tokenizer` and `scheduler`, as saved by `save_pretrained` of
        `CogVideoXPipeline` or `CogVideoXImageToVideoPipeline` in diffusers.
      variant: of the weights, see `pipeline_weights`.

    Raises:
      ValueError: another kind of pipeline, missing subfolders (all are listed), networks that are not CogVideoX's or do
        not match each other, an unknown scheduler, no tokenizer.
    """
    _check_folder(folder)
    for place in (folder, folder / TOKENIZER, (folder / SCHEDULER_FILE).parent):
        check_digests(place)
    found = {name: read_config(folder / name) for name in NETWORKS}
    for name, kind in NETWORKS.items():
        if not isinstance(found[name], kind):
            raise ValueError(
                f"{folder / name} holds a {type(found[name]).__name__}; a {PIPELINE} has a {kind.__name__} there."
            )
    denoiser, vae, encoder = found.values()
    paths = pipeline_weights(folder, variant)
    condition: Condition = "none" if denoiser.in_channels == denoiser.out_channels else "first_frame"
    _check_class(folder, condition)
    check_condition(condition, denoiser, str(folder / DENOISER))
    scheduler = schedulers.from_diffusers(read_json_object(folder / SCHEDULER_FILE), str(folder / SCHEDULER_FILE))
    tokenizer.load(folder / TOKENIZER)
    config = TextToVideoConfig(
        denoiser=denoiser,
        text=TextConfig(
            encoder=encoder,
            length=denoiser.text_length,
            weights=str(paths[TEXT_ENCODER]),
            tokenizer=str(folder / TOKENIZER),
        ),
        vae=vae,
        vae_weights=str(paths[VAE]),
        latent_scale=vae.scaling_factor,
        spatial_compression=vae.downsampling,
        temporal_compression=vae.temporal_downsampling,
        condition=condition,
        schedule=scheduler.schedule,
        objective=ObjectiveConfig(target=scheduler.prediction),
        sampler=scheduler.sampler,
        guidance=GuidanceConfig(),
    )
    try:
        validate_tree(config)
    except ValueError as error:
        raise ValueError(f"{folder}: the networks do not match each other: {error}") from error
    return config


def adopt_pipeline(task: TaskConfig, folder: Path, variant: str | None = None) -> TextToVideoConfig:
    """A text-to-video task with the text encoder and the VAE of a pipeline folder.

    Args:
      task: the task that is initialized with the pipeline's denoiser; its text encoder must be that of the pipeline.
      folder, variant: see `read_pipeline`.

    Raises:
      ValueError: not a text-to-video task, or other latents, noise or prediction than those of the pipeline's denoiser;
        all differences are listed.
    """
    if not isinstance(task, TextToVideoConfig):
        raise ValueError(f"{folder} is a pipeline, which initializes a text-to-video task, not {type(task).__name__}.")
    found = read_pipeline(folder, variant)
    asked = {
        "text.length": (task.text.length, found.text.length),
        "latent_scale": (task.latent_scale, found.latent_scale),
        "latent_shift": (task.latent_shift, found.latent_shift),
        "spatial_compression": (task.spatial_compression, found.spatial_compression),
        "temporal_compression": (task.temporal_compression, found.temporal_compression),
        "objective.target": (task.objective.target, found.objective.target),
    }
    if task.condition != "none":
        # Else no latents of given frames are made.
        asked["vae.invert_scale_latents"] = (task.inverts_given_scale, found.inverts_given_scale)
    lines = [f"task.text.encoder: {line}" for line in differences(found.text.encoder, task.text.encoder)]
    lines += [
        f"task.{name} = {here!r}, the pipeline's is {there!r}" for name, (here, there) in asked.items() if here != there
    ]
    if task.schedule.continuous or not np.allclose(alpha_bar_table(task.schedule), alpha_bar_table(found.schedule)):
        lines.append(f"task.schedule = {task.schedule!r}, the pipeline's is {found.schedule!r}")
    if lines:
        raise ValueError("\n  ".join([f"{folder} was trained with other settings than the config:", *lines]))
    text = task.text.replace(weights=found.text.weights, tokenizer=found.text.tokenizer)
    return task.replace(text=text, vae=found.vae, vae_weights=found.vae_weights)


def default_request(config: TextToVideoConfig) -> SampleRequest:
    """The clip size of a published network."""
    denoiser = config.denoiser
    if denoiser.temporal_patch is not None:
        return DEFAULT_REQUEST_1_5
    return SampleRequest(
        frames=(denoiser.sample_frames - 1) * config.temporal_compression + 1,
        height=denoiser.sample_height * config.spatial_compression,
        width=denoiser.sample_width * config.spatial_compression,
    )


def frames_per_second(config: TextToVideoConfig) -> int:
    """Frame rate of a network's clips: twice as high for CogVideoX1.5, which has patches of several frames."""
    return FRAMES_PER_SECOND if config.denoiser.temporal_patch is None else FRAMES_PER_SECOND_1_5


def _check_class(folder: Path, condition: Condition) -> None:
    kind = read_json_object(folder / INDEX).get("_class_name") if (folder / INDEX).is_file() else None
    if kind is not None and PIPELINES[kind] != (condition != "none"):
        held = "takes the latents of an image" if condition != "none" else "takes no image"
        raise ValueError(
            f"{folder / INDEX}: the pipeline is a {kind}, but its transformer {held}; one of them is of another "
            "pipeline."
        )


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"weights {str(folder)!r}: no such folder; give a local folder of a CogVideoX pipeline.")
    if (folder / INDEX).is_file():
        kind = read_json_object(folder / INDEX).get("_class_name")
        if kind is not None and kind not in PIPELINES:
            raise ValueError(f"{folder / INDEX}: the pipeline is a {kind}; supported are {', '.join(PIPELINES)}.")
    wanted = [*(f"{name}/config.json" for name in NETWORKS), TOKENIZER, SCHEDULER_FILE]
    missing = [name for name in wanted if not (folder / name).exists()]
    if missing and not is_pipeline(folder):
        single = sorted(path.parent.name for path in folder.glob("*/config.json"))
        if single or (folder / "config.json").is_file():
            held = f"the networks {', '.join(single)}" if single else "one network"
            give = f"{folder / single[0]}" if single else f"{folder}"
            raise ValueError(
                f"{folder} is not a pipeline: it holds {held}. `jvgen import` and `jvgen verify` take a single "
                f"network, for example {give}; clips need a whole pipeline, as `jvgen export` writes "
                "of a text-to-video run."
            )
    if missing:
        raise ValueError(
            f"{folder} is not a complete CogVideoX pipeline: it has no {', '.join(missing)}. Expected are the files of "
            f"{PIPELINE}.save_pretrained in diffusers."
        )
