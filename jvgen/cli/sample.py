"""`jvgen sample`: prompts to clips, with a trained run or with published weights."""

import argparse
from pathlib import Path

from jvgen.cli.data import frame_size

# What only one of the two ways of sampling knows, with what stands for "not given".
OF_RUNS = {"ema": "best", "step": None, "untrained": False, "cameras": [], "views": None, "vae": None}
OF_WEIGHTS = {
    "sampler": None, "spacing": None, "levels": "schedule", "dynamic_guidance": False, "negative_prompt": "",
    "null": "empty", "noise": None, "dtype": None, "tiles": False, "fps": None, "naming": None, "devices": None,
}  # fmt: skip


def add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    """Add everything but the run, its step and its average to the parser of `jvgen sample`."""
    parser.add_argument("--weights", type=Path, default=None, help="folder of a CogVideoX pipeline, in place of a run")
    parser.add_argument("--prompt", action="append", default=[], help="what to show (repeatable)")
    parser.add_argument("--prompts", type=Path, help="file with one prompt a line, or VBench's JSON")
    parser.add_argument("--num", type=int, default=1, help="clips per prompt")
    parser.add_argument(
        "--frames", type=int, default=None, help="per clip; those that the network is made for if not given"
    )
    parser.add_argument("--size", type=frame_size, default=None, metavar="HxW", help="likewise")
    parser.add_argument(
        "--steps", type=int, default=None, help="sampler steps; the task's if not given, 50 for --weights"
    )
    parser.add_argument("--guidance", type=float, default=None, help="guidance scale; the task's, or 6 for --weights")
    parser.add_argument(
        "--enhance", type=float, default=None, metavar="TEMPERATURE",
        help="scale attention across frames (Enhance-A-Video), 3.4 as published; the task's if not given",
    )  # fmt: skip
    parser.add_argument(
        "--enhance-set", action="append", default=[], metavar="FIELD=VALUE",
        help="share=head, start=0.2, end=0.8, relative=true, gain=1.15 (adaptive), layers=1,1,0,... (repeatable)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="clip i of prompt p is drawn from (seed, p, i)")
    parser.add_argument("--batch", type=int, default=None, help="clips generated together; 8, or 1 for --weights")
    parser.add_argument("--untrained", action="store_true", help="random weights of the run, as a baseline")
    parser.add_argument(
        "--vae", type=Path, default=None, metavar="FOLDER",
        help="decode with this exported autoencoder, which shares latents with the run's (CV-VAE: 4(n - 1) + 1 frames)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder for mp4 files, or one .mp4 file")
    views = parser.add_argument_group("with a run that sees several views")
    views.add_argument(
        "--cameras", nargs="+", default=[], metavar="PATH|FILE",
        help="circle, hemisphere, interpolate, dolly, or a camera file (RealEstate10K's) for each view",
    )  # fmt: skip
    views.add_argument("--views", type=int, default=None, help="how many; one a file, or 2, if not given")
    views.add_argument("--camera-distance", type=float, default=0.5, help="how far a named path goes")
    views.add_argument(
        "--one-world", action="store_true", help="camera files are of one world, and do not begin at one place"
    )
    published = parser.add_argument_group("with --weights only")
    published.add_argument("--negative-prompt", default="", metavar="TEXT", help="what guidance leads away from")
    published.add_argument(
        "--null",
        choices=["empty", "zeros"],
        default="empty",
        help="what stands for no prompt: its embeddings, or zeros",
    )
    published.add_argument("--dynamic-guidance", action="store_true", help="guidance that changes with the timestep")
    published.add_argument(
        "--sampler",
        choices=["ddim", "dpm_solver", "dpm_solver_sde"],
        default=None,
        help="in place of the pipeline's scheduler",
    )
    published.add_argument(
        "--spacing", choices=["trailing", "leading", "linspace"], default=None,
        help="of timesteps, in place of the scheduler's; CogVideoX's authors sample with trailing",
    )  # fmt: skip
    published.add_argument(
        "--levels", choices=["schedule", "sat"], default="schedule",
        help="levels of signal as the code that trained CogVideoX and RepVideo samples with them (sat)",
    )  # fmt: skip
    published.add_argument("--noise", type=Path, default=None, metavar="FILE", help=".npy of the latents to start from")
    published.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default=None,
        help="of the computation; float32 on CPUs and bfloat16 elsewhere if not given",
    )  # fmt: skip
    published.add_argument("--tiles", action="store_true", help="decode tile by tile: less memory, blended edges")
    published.add_argument("--fps", type=float, default=None, help="frames a second of the files; 8, or 16 for 1.5")
    published.add_argument(
        "--naming", choices=["numbered", "vbench"], default=None,
        help="of files in a folder: 0000_00_a_red_ball.mp4, or 'a red ball-0.mp4', the default for JSON prompts",
    )  # fmt: skip
    published.add_argument(
        "--devices", type=int, default=None, help="how many of this machine's to use; all if not given"
    )
    parser.set_defaults(handler=_run_sample)


def _run_sample(parsed: argparse.Namespace) -> int:
    from jvgen.runs.prompts import read_prompts

    if (parsed.run is None) == (parsed.weights is None):
        raise ValueError("give the work folder of a run, or --weights with the folder of a pipeline: one of them.")
    foreign = OF_RUNS if parsed.weights is not None else OF_WEIGHTS
    wrong = [name for name, unset in foreign.items() if getattr(parsed, name) != unset]
    if wrong:
        options = ", ".join("--" + name.replace("_", "-") for name in wrong)
        raise ValueError(f"{options}: only {'a run has' if foreign is OF_RUNS else '--weights has'} that option.")
    prompts = list(parsed.prompt)
    if parsed.prompts is not None:
        prompts += read_prompts(parsed.prompts)
    if not prompts:
        raise ValueError("nothing to sample: give --prompt TEXT (repeatable) or --prompts FILE.")
    sample = _sample_run if parsed.weights is None else _sample_weights
    sample(parsed, prompts)
    return 0


def _sample_run(parsed: argparse.Namespace, prompts: list[str]) -> None:
    if parsed.cameras or parsed.views is not None:
        _sample_views(parsed, prompts)
        return
    from jvgen.runs.sampling import sample_run

    sample_run(
        parsed.run, prompts, parsed.out, ema=parsed.ema, step=parsed.step, count=parsed.num, frames=parsed.frames,
        size=parsed.size, steps=parsed.steps, guidance=parsed.guidance, seed=parsed.seed,
        batch=8 if parsed.batch is None else parsed.batch, untrained=parsed.untrained, enhance=_enhance(parsed),
        vae=parsed.vae,
    )  # fmt: skip


def _sample_views(parsed: argparse.Namespace, prompts: list[str]) -> None:
    from jvgen.runs.view_sampling import sample_views

    if parsed.vae is not None:
        raise ValueError("--vae: not with --cameras; views are decoded with the run's own autoencoder.")
    if _enhance(parsed) is not None:
        raise ValueError("--enhance: not with --cameras; views are generated without it.")
    sample_views(
        parsed.run, prompts, parsed.out, cameras=parsed.cameras, views=parsed.views, distance=parsed.camera_distance,
        one_world=parsed.one_world, ema=parsed.ema, step=parsed.step, count=parsed.num, frames=parsed.frames,
        size=parsed.size, steps=parsed.steps, guidance=parsed.guidance, seed=parsed.seed, batch=parsed.batch,
        untrained=parsed.untrained,
    )  # fmt: skip


def _sample_weights(parsed: argparse.Namespace, prompts: list[str]) -> None:
    from jvgen.runs.published.pipeline import PublishedRequest, sample_published

    request = PublishedRequest(
        frames=parsed.frames, size=parsed.size, steps=parsed.steps, guidance=parsed.guidance, sampler=parsed.sampler,
        spacing=parsed.spacing, levels=parsed.levels, dynamic_guidance=parsed.dynamic_guidance,
        negative_prompt=parsed.negative_prompt, null=parsed.null,
        seed=parsed.seed, batch=1 if parsed.batch is None else parsed.batch, noise=parsed.noise, dtype=parsed.dtype,
        in_tiles=parsed.tiles, frames_per_second=parsed.fps, devices=parsed.devices, enhance=_enhance(parsed),
    )  # fmt: skip
    listed = parsed.prompts is not None and parsed.prompts.suffix == ".json"
    naming = parsed.naming or ("vbench" if listed else "numbered")
    if naming == "vbench":
        prompts = list(dict.fromkeys(prompts))
    sample_published(parsed.weights, prompts, parsed.out, request, count=parsed.num, naming=naming)


def _enhance(parsed: argparse.Namespace):
    """What the options say of enhanced attention; None where they say nothing."""
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
