"""A text-to-video run as the folder of a whole CogVideoX pipeline, for diffusers and for `jvgen sample --weights`."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from jvgen.config import Config
from jvgen.diffusion.schedule import alpha_bar_table
from jvgen.interop import schedulers
from jvgen.interop.formats import format_of
from jvgen.interop.from_torch import import_folder
from jvgen.interop.to_torch import Weights
from jvgen.models.cogvideox_vae.config import CogVideoXVAEConfig
from jvgen.models.t5.config import T5Config
from jvgen.nn.network import Parameters
from jvgen.storage import Path, as_path, local_copy, read_json_object
from jvgen.tasks.pipeline_folder import (
    DENOISER,
    IMAGE_PIPELINE,
    INDEX,
    PIPELINE,
    SCHEDULER_FILE,
    TEXT_ENCODER,
    TOKENIZER,
    VAE,
)
from jvgen.tasks.task import Task
from jvgen.tasks.text_to_video import TextToVideo, TextToVideoConfig

# Of diffusers: the first with this pipeline.
DIFFUSERS_VERSION = "0.30.0"
PIPELINE_TEXT_LENGTH = 226  # tokens, by default, whatever the transformer's config says
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = ("tokenizer.json", "spiece.model", TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json")


def is_text_to_video(task: Task) -> bool:
    """Whether a pipeline could be written of a run of the task: it generates single clips from captions."""
    return isinstance(task, TextToVideo) and type(task.config) is TextToVideoConfig


def obstacles(config: TextToVideoConfig, trained_with: str | None = None, *, vae_was_given: bool = False) -> list[str]:
    """Why diffusers' pipeline cannot hold a run; nothing if it can.

    Args:
      config: of the run.
      trained_with: content hash of the frozen weights in the checkpoint; None or "" to compare none.
      vae_was_given: the run itself names no VAE, see `TaskConfig.with_vae`.
    """
    scheduler = schedulers.Scheduler(config.schedule, config.objective.target, config.sampler)
    config = config.for_prompts()
    if config.alignment is not None:
        # Its image encoder is in no pipeline, and need not be there any more; its hash is the run's last one.
        config, trained_with = config.replace(alignment=None), trained_with and trained_with.rpartition("+")[0]
    rules = (
        (
            config.text.embeddings is None,
            "task.text.weights, task.text.tokenizer: the run was trained on cached embeddings and names no T5",
        ),
        (config.text.padding == "attended", "task.text.padding = 'zeros': the pipeline's T5 attends to padding"),
        (
            config.denoiser.aggregation is None,
            "task.denoiser.aggregation: diffusers has no class with RepVideo's gates",
        ),
        (isinstance(config.text.encoder, T5Config), f"task.text.encoder: {_name(config.text.encoder)} is no T5"),
        (
            config.vae is not None,
            "task.vae = none: the run names no VAE; give that which made the latents, --vae DIR",
        ),
        (
            config.vae is None or isinstance(config.vae, CogVideoXVAEConfig),
            f"task.vae: {_name(config.vae)} is not diffusers' AutoencoderKLCogVideoX",
        ),
        (config.latent_shift == 0, f"task.latent_shift = {config.latent_shift}: the pipeline only scales latents"),
        (
            config.text.length == config.denoiser.text_length,
            f"task.text.length = {config.text.length}: the pipeline pads captions to denoiser.text_length = "
            f"{config.denoiser.text_length}",
        ),
        (
            _fits(scheduler),
            f"task.schedule, task.objective: its schedulers have no {config.schedule.kind!r} with the target "
            f"{config.objective.target!r}",
        ),
    )
    found = [text for holds, text in rules if not holds]
    if found:
        return found
    try:
        config.check_weights()
    except ValueError as error:
        return [str(error)]
    own = config.replace(vae=None, vae_weights=None) if vae_was_given else config
    if trained_with and own.build().frozen_digest() != trained_with:
        return [
            "task.vae_weights, task.text.weights: the files are not those that the run was trained with (another "
            "content hash)"
        ]
    return []


def parts(
    config: TextToVideoConfig, parameters: Parameters
) -> tuple[dict[str, Config], dict[str, Weights], dict[str, str | Path]]:
    """Networks by folder, their parameters, and the other files of the pipeline, for `export_networks`.

    Frozen networks are read strictly, from the run's own files, when they are written.

    Args:
      config: of a run without `obstacles`.
      parameters: of its denoiser, and of its text encoder if that is not the one in its file, by name.
    """
    scheduler = _scheduler_file(config)
    # The pipeline reads the scale of latents in the VAE's configuration.
    vae = config.vae.replace(scaling_factor=config.latent_scale)
    networks = {DENOISER: config.denoiser, VAE: vae, TEXT_ENCODER: config.text.encoder}
    weights: dict[str, Weights] = {
        DENOISER: parameters["denoiser"],
        VAE: lambda: import_folder(config.vae_weights, config.vae)[1],
        TEXT_ENCODER: lambda: import_folder(config.text.weights, config.text.encoder)[1],
    }
    if "text_encoder" in parameters:
        weights[TEXT_ENCODER] = parameters["text_encoder"]
    tokenizer = tokenizer_files(as_path(config.text.tokenizer))
    classes = {name: [format_of(network).library, format_of(network).class_name] for name, network in networks.items()}
    classes |= {
        "scheduler": ["diffusers", scheduler["_class_name"]],
        TOKENIZER: ["transformers", _tokenizer_class(tokenizer)],
    }
    name = PIPELINE if config.condition == "none" else IMAGE_PIPELINE
    index = {"_class_name": name, "_diffusers_version": DIFFUSERS_VERSION, **dict(sorted(classes.items()))}
    files: dict[str, str | Path] = {f"{TOKENIZER}/{name}": path for name, path in tokenizer.items()}
    files |= {
        name: json.dumps(value, indent=2) + "\n" for name, value in {SCHEDULER_FILE: scheduler, INDEX: index}.items()
    }
    return networks, weights, files


def notes(config: TextToVideoConfig, dtype: str = "float32") -> list[str]:
    """What the pipeline, with weights of a dtype, does by default in another way than the run, and how to have the
    run's."""
    found = []
    if dtype != "float32":
        # Seen with diffusers 0.42 and transformers 5.23.
        found.append(
            f"load the pipeline with from_pretrained(..., torch_dtype=torch.{dtype}): by default diffusers makes "
            f"float32 of the transformer and the VAE, and transformers leaves the text encoder in {dtype}; these do "
            "not go together"
        )
    if config.text.length != PIPELINE_TEXT_LENGTH:
        found.append(
            f"diffusers' pipeline pads captions to {PIPELINE_TEXT_LENGTH} tokens: call it with "
            f"max_sequence_length={config.text.length}"
        )
    if config.condition == "first_and_last":
        found.append(
            "the run was trained with the first and the last frame, of which diffusers' pipeline takes the first; "
            "`jvgen sample --weights` takes both (--image, --last-image)"
        )
    if config.text.unconditional == "zeros":
        found.append(
            "the run was trained with zeros for no caption, diffusers' pipeline encodes an empty one: pass "
            "negative_prompt_embeds of zeros there, `--unconditional zeros` to `jvgen sample --weights`"
        )
    chunks = ("encode_chunk_frames", "decode_chunk_frames")
    if differ := [name for name in chunks if getattr(config.vae, name) != getattr(CogVideoXVAEConfig(), name)]:
        asked = ", ".join(f"{name} = {getattr(config.vae, name)}" for name in differ)
        found.append(
            f"the run's VAE codes chunks of frames with {asked}, which no file says: diffusers and `jvgen sample "
            "--weights` take 8 frames and 2 latent frames"
        )
    kept = schedulers.from_diffusers(_scheduler_file(config), SCHEDULER_FILE).sampler
    names = ("kind", "spacing", "eta", "steps_offset", "final_step_clean", "levels")
    differ = [name for name in names if getattr(kept, name) != getattr(config.sampler, name)]
    if differ:
        asked = ", ".join(f"{name} = {getattr(config.sampler, name)!r}" for name in differ)
        found.append(f"the run samples with {asked}, which the scheduler's file cannot say")
    return found


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """The files of a tokenizer in a folder by name, as local paths."""
    return {name: local_copy(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()}


def _tokenizer_class(files: Mapping[str, Path]) -> str:
    if TOKENIZER_CONFIG in files:
        name = read_json_object(files[TOKENIZER_CONFIG]).get("tokenizer_class")
        if name in ("T5Tokenizer", "T5TokenizerFast"):
            return name
    return "T5Tokenizer" if "spiece.model" in files else "T5TokenizerFast"


def _scheduler_file(config: TextToVideoConfig) -> dict[str, Any]:
    values = schedulers.to_diffusers(schedulers.Scheduler(config.schedule, config.objective.target, config.sampler))
    assert values is not None, "obstacles() says so"
    return values


def _fits(scheduler: schedulers.Scheduler) -> bool:
    """Whether a pipeline's scheduler has the noise schedule and the prediction."""
    if scheduler.schedule.continuous:
        return False
    values = schedulers.to_diffusers(scheduler)
    if values is None:
        return False
    read = schedulers.from_diffusers(values, SCHEDULER_FILE)
    same_levels = np.allclose(alpha_bar_table(read.schedule), alpha_bar_table(scheduler.schedule), atol=1e-7)
    return same_levels and read.prediction == scheduler.prediction


def _name(config: Config | None) -> str:
    return type(config).__name__
