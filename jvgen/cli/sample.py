"""`jvgen sample`: generate clips from prompts, with a trained run or with published weights."""

import argparse
import functools
from collections.abc import Sequence

from jvgen.cli.arguments import (
    DTYPES,
    add_command,
    add_run_arguments,
    add_variant_argument,
    check_foreign,
    frame_size,
    number,
    path,
)
from jvgen.value_rules import Count, Epsilon, FrameRate, Frames, Scale, Seed

# How the flag's choices are named in requests.
UNCONDITIONAL = {"empty-caption": "empty", "zeros": "zeros"}


def add_commands(commands) -> None:
    """Add `sample`."""
    parser = add_command(
        commands, "sample", "generate clips from prompts, with a trained run or with published weights",
        'jvgen sample runs/demo/text_to_video --prompt "a red ball moves to the left" --out clips',
        'jvgen sample --weights CogVideoX-2b --prompt "a red ball rolls" --frames 49 --size 480x720 --out clip.mp4',
        'jvgen sample --weights CogVideoX-5b-I2V --image first.png --prompt "a red ball rolls" --out clip.mp4',
        details="Takes exactly one of RUN and --weights. Clips that exist in --out are kept and not generated again.",
    )  # fmt: skip
    run_only = add_run_arguments(parser, optional=True)
    parser.add_argument(
        "--weights", type=path, metavar="DIR", help="folder of a CogVideoX pipeline in diffusers format"
    )
    _add_request(parser)
    run_only += _add_run_options(parser)
    weights_only = _add_weights_options(parser)
    parser.set_defaults(handler=functools.partial(run_sample, run_only=run_only, weights_only=weights_only))


def _add_request(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="text prompt (repeatable)")
    parser.add_argument(
        "--prompts", type=path, metavar="FILE", help="file with one prompt per line, or VBench's JSON file of prompts"
    )
    parser.add_argument(
        "--image", type=path, action="append", default=[], metavar="FILE",
        help="first frame of the clips, for an image-to-video network (repeatable: one per prompt or, with --cameras, "
        "one per view)",
    )  # fmt: skip
    parser.add_argument(
        "--last-image", type=path, action="append", default=[], metavar="FILE",
        help="last frame of the clips, for a network that takes both (repeatable, as --image)",
    )  # fmt: skip
    parser.add_argument(
        "--video", type=path, metavar="FILE", help="change this clip: sampling starts from it with part of the noise"
    )
    parser.add_argument(
        "--strength", type=number(Epsilon), metavar="X",
        help="how much of --video is changed, above 0 and up to 1; 0.8 if omitted",
    )  # fmt: skip
    parser.add_argument(
        "--fit", choices=["crop", "pad"],
        help="what is done with an --image or --video of another aspect ratio: cut around the center, or add black "
        "bars; refused if omitted",
    )  # fmt: skip
    parser.add_argument(
        "--clips-per-prompt", type=number(Count), default=1, metavar="N", help="clips to generate per prompt"
    )
    parser.add_argument(
        "--frames", type=number(Frames), metavar="N", help="frames per clip; the training length if omitted"
    )
    parser.add_argument(
        "--size", type=frame_size, metavar="HxW",
        help="frame height and width in pixels; the training size if omitted",
    )  # fmt: skip
    parser.add_argument(
        "--steps",
        type=number(Count),
        metavar="N",
        help="sampler steps; those of the run's config, or 50 with --weights",
    )
    parser.add_argument(
        "--guidance", type=number(Scale), metavar="SCALE",
        help="scale of classifier-free guidance; that of the run's config, or 6 with --weights",
    )  # fmt: skip
    parser.add_argument(
        "--enhance", type=number(Scale), metavar="TEMPERATURE",
        help="scale cross-frame attention as Enhance-A-Video does, with this temperature (3.4 as published); "
        "as in the run's config if omitted",
    )  # fmt: skip
    parser.add_argument(
        "--enhance-set", action="append", default=[], metavar="FIELD=VALUE",
        help="a field of EnhanceConfig: share=head, start=0.2, end=0.8, relative=true, gain=1.15 (adaptive "
        "temperature), layers=1,1,0,... (repeatable)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=number(Seed), default=0, metavar="N",
        help="random seed; clip i of prompt p depends on (seed, p, i) only",
    )  # fmt: skip
    parser.add_argument(
        "--batch-size",
        type=number(Count),
        metavar="N",
        help="clips generated at once; 8, or 1 with --weights, if omitted",
    )
    parser.add_argument(
        "--out", type=path, required=True, metavar="PATH", help="folder for .mp4 files, or one .mp4 file"
    )


def _add_run_options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Options that need RUN."""
    run = parser.add_argument_group("options for RUN")
    views = parser.add_argument_group("options for a RUN that generates several views")
    return [
        run.add_argument(
            "--untrained", action="store_true", help="use randomly initialized parameters instead, as a baseline"
        ),
        run.add_argument(
            "--vae", type=path, metavar="DIR",
            help="the VAE that made the latents of a run whose config names none; or, without --cameras, another to "
            "decode with instead of the run's, which must share its latent space (a CV-VAE makes 4(n - 1) + 1 frames "
            "of n latents)",
        ),
        views.add_argument(
            "--cameras", nargs="+", default=[], metavar="PATH|FILE",
            help="camera path (circle, hemisphere, interpolate or dolly), or one RealEstate10K camera file per view",
        ),
        views.add_argument(
            "--views", type=number(Count), metavar="N", help="number of views; one per camera file, or 2, if omitted"
        ),
        views.add_argument(
            "--camera-distance", type=number(Scale), default=0.5, metavar="D",
            help="distance from the first to the last camera of a camera path, in the units of the training cameras",
        ),
        views.add_argument(
            "--shared-world-frame", action="store_true",
            help="camera files share one world frame; otherwise each view's first camera is at the same pose",
        ),
    ]  # fmt: skip


def _add_weights_options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Options that need `--weights`."""
    group = parser.add_argument_group("options for --weights")
    return [
        group.add_argument(
            "--negative-prompt", default="", metavar="TEXT", help="negative prompt of classifier-free guidance"
        ),
        group.add_argument(
            "--unconditional", choices=list(UNCONDITIONAL), default="empty-caption",
            help="unconditional embedding of classifier-free guidance: the text encoder's for an empty caption (or "
            "for --negative-prompt), or zeros",
        ),
        group.add_argument(
            "--dynamic-guidance", action="store_true", help="vary the guidance scale with the timestep, as CogVideoX"
        ),
        group.add_argument(
            "--sampler", choices=["ddim", "dpm_solver", "dpm_solver_sde"],
            help="sampler; that of the pipeline's scheduler if omitted",
        ),
        group.add_argument(
            "--timestep-spacing", choices=["trailing", "leading", "linspace"],
            help="spacing of the sampler's timesteps; that of the pipeline's scheduler if omitted (CogVideoX's authors "
            "sample with trailing)",
        ),
        group.add_argument(
            "--noise-levels", choices=["schedule", "sat"], default="schedule",
            help="noise levels of the sampler's steps: from the scheduler's config, or as CogVideoX's and RepVideo's "
            "training code (sat) samples",
        ),
        group.add_argument(
            "--noise", type=path, metavar="FILE", help=".npy file with the initial noise, in the shape of the latents"
        ),
        group.add_argument(
            "--dtype", choices=DTYPES,
            help="dtype of parameters and computation; float32 on CPUs and bfloat16 elsewhere if omitted",
        ),
        group.add_argument(
            "--tiles", action="store_true", help="decode in overlapping, blended tiles, which takes less memory"
        ),
        group.add_argument(
            "--fps", type=number(FrameRate), metavar="RATE",
            help="frame rate of the files in frames per second; 8, or 16 for CogVideoX 1.5, if omitted",
        ),
        group.add_argument(
            "--naming", choices=["numbered", "vbench"],
            help="names of files in a folder: 0000_00_a_red_ball.mp4, or 'a red ball-0.mp4', which is the default for "
            "JSON prompts",
        ),
        group.add_argument(
            "--lora", action="append", default=[], metavar="FILE[:SCALE]",
            help="LoRA adapter of the denoiser in diffusers' or SAT's format, of the text encoder in peft's, or a "
            "folder with both as `jvgen export` writes it, and the strength of its update, 1 if omitted (repeatable)",
        ),
        group.add_argument(
            "--lora-unmerged", action="store_true",
            help="keep the adapters beside the weights, which rounds less in bfloat16 and takes longer; otherwise they "
            "are merged into the weights",
        ),
        add_variant_argument(group),
        group.add_argument(
            "--devices", type=number(Count), metavar="N", help="number of this machine's devices to use; all if omitted"
        ),
    ]  # fmt: skip


def run_sample(
    parsed: argparse.Namespace, *, run_only: Sequence[argparse.Action], weights_only: Sequence[argparse.Action]
) -> int:
    """Sample with the run or with the published weights."""
    from jvgen.runs.prompts import read_prompts

    if (parsed.run is None) == (parsed.weights is None):
        raise ValueError("give exactly one of RUN (a run directory) and --weights DIR (a CogVideoX pipeline).")
    needed, foreign = ("RUN", run_only) if parsed.weights is not None else ("--weights", weights_only)
    check_foreign(parsed, foreign, needed)
    prompts = list(parsed.prompt)
    if parsed.prompts is not None:
        prompts += read_prompts(parsed.prompts)
    if not prompts:
        raise ValueError("no prompts: give --prompt TEXT (repeatable) or --prompts FILE.")
    if parsed.weights is not None:
        _sample_weights(parsed, prompts)
    elif parsed.cameras or parsed.views is not None:
        _sample_views(parsed, prompts)
    else:
        _sample_run(parsed, prompts)
    return 0


def _sample_run(parsed: argparse.Namespace, prompts: list[str]) -> None:
    from jvgen.runs.sampling import sample_run

    given = given_files(parsed)
    sample_run(
        parsed.run, prompts, parsed.out, ema=parsed.ema, step=parsed.step, count=parsed.clips_per_prompt,
        frames=parsed.frames, size=parsed.size, steps=parsed.steps, guidance=parsed.guidance, seed=parsed.seed,
        batch=8 if parsed.batch_size is None else parsed.batch_size, untrained=parsed.untrained,
        enhance=enhance_config(parsed), vae=parsed.vae, given=given,
    )  # fmt: skip


def _sample_views(parsed: argparse.Namespace, prompts: list[str]) -> None:
    from jvgen.runs.view_sampling import sample_views

    if enhance_config(parsed) is not None:
        raise ValueError("--enhance: not valid with --cameras; views are generated without it.")
    sample_views(
        parsed.run, prompts, parsed.out, cameras=parsed.cameras, views=parsed.views, distance=parsed.camera_distance,
        shared_world_frame=parsed.shared_world_frame, ema=parsed.ema, step=parsed.step, count=parsed.clips_per_prompt,
        frames=parsed.frames, size=parsed.size, steps=parsed.steps, guidance=parsed.guidance, seed=parsed.seed,
        batch=parsed.batch_size, untrained=parsed.untrained, vae=parsed.vae, given=given_files(parsed),
    )  # fmt: skip


def _sample_weights(parsed: argparse.Namespace, prompts: list[str]) -> None:
    from jvgen.runs.published.pipeline import PublishedRequest, sample_published

    request = PublishedRequest(
        frames=parsed.frames, size=parsed.size, steps=parsed.steps, guidance=parsed.guidance, sampler=parsed.sampler,
        spacing=parsed.timestep_spacing, levels=parsed.noise_levels, dynamic_guidance=parsed.dynamic_guidance,
        negative_prompt=parsed.negative_prompt, null=UNCONDITIONAL[parsed.unconditional],
        seed=parsed.seed, batch=1 if parsed.batch_size is None else parsed.batch_size, noise=parsed.noise,
        dtype=parsed.dtype, in_tiles=parsed.tiles, frames_per_second=parsed.fps, devices=parsed.devices,
        enhance=enhance_config(parsed), variant=parsed.variant, given=given_files(parsed),
        loras=tuple(lora_argument(text) for text in parsed.lora), lora_unmerged=parsed.lora_unmerged,
    )  # fmt: skip
    listed = parsed.prompts is not None and parsed.prompts.suffix == ".json"
    naming = parsed.naming or ("vbench" if listed else "numbered")
    if naming == "vbench":
        prompts = list(dict.fromkeys(prompts))
    sample_published(parsed.weights, prompts, parsed.out, request, count=parsed.clips_per_prompt, naming=naming)


def lora_argument(text: str):
    """File and scale of `--lora FILE[:SCALE]`.

    Raises:
      ValueError: a scale that is no finite number.
    """
    file, separator, scale = text.rpartition(":")
    # A bucket's address has a colon too.
    if not separator or scale.startswith("//"):
        return path(text), 1.0
    if path(text).exists():
        return path(text), 1.0
    try:
        return path(file), number(Scale)(scale)
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"--lora {text}: {scale!r} is no scale: {error}") from error


def given_files(parsed: argparse.Namespace):
    """The `GivenFiles` that `--image`, `--last-image`, `--video`, `--strength` and `--fit` name."""
    from jvgen.runs.given_files import GivenFiles

    return GivenFiles(tuple(parsed.image), tuple(parsed.last_image), parsed.video, parsed.strength, parsed.fit)


def enhance_config(parsed: argparse.Namespace):
    """The `EnhanceConfig` that `--enhance` and `--enhance-set` describe; None if neither is given."""
    from jvgen import config
    from jvgen.models.video_dit.enhance import EnhanceConfig

    if parsed.enhance is None and not parsed.enhance_set:
        return None
    wanted = EnhanceConfig() if parsed.enhance is None else EnhanceConfig(temperature=parsed.enhance)
    if any(word.partition("=")[0].strip() == "gain" for word in parsed.enhance_set):
        wanted = wanted.replace(share="head")
    wanted = config.override(wanted, parsed.enhance_set)
    config.validate_tree(wanted)
    return wanted
