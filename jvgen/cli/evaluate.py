"""`jvgen evaluate` and `jvgen analyze`: measure a trained run or an exported VAE on held-out data."""

import argparse
import functools
from collections.abc import Sequence

from jvgen.cli.arguments import (
    add_command,
    add_run_arguments,
    check_foreign,
    check_output,
    frame_size,
    number,
    path,
)
from jvgen.value_rules import Count, CountOrZero, Frames, Scale, Seed


def add_commands(commands) -> None:
    """Add `evaluate` and `analyze`."""
    _add_evaluate(commands)
    _add_analyze(commands)


def _add_evaluate(commands) -> None:
    parser = add_command(
        commands, "evaluate", "measure a trained run, or an exported VAE, on held-out data",
        "jvgen evaluate runs/demo/image_vae --batches 8",
        "jvgen evaluate runs/demo/text_to_video --samples 64 --i3d i3d.safetensors --clip-model clip-vit-base-patch32",
        "jvgen evaluate --vae exported/vae --data data/videos --size 256x256 --out evaluation",
        details="Takes RUN or --vae, or both where the run's config names no VAE. Prints the task's metrics "
        "(reconstruction PSNR and SSIM, loss by timestep band, ...) and writes them as JSON. With --samples, "
        "text-to-video and multi-view runs generate clips for held-out captions (and cameras), which are measured "
        "beside the recorded ones: over time, as a distribution, against captions, and against cameras. Measures whose "
        "weights were not given are listed. With --vae alone it measures reconstructions and, with --image-vae, how "
        "well each VAE decodes the other's latents.",
    )  # fmt: skip
    run_only = add_run_arguments(parser, optional=True)
    _add_data_argument(parser)
    parser.add_argument(
        "--batches", type=number(Count), default=16, metavar="N", help="batches that metrics are averaged over"
    )
    run_only.append(_add_untrained_argument(parser))
    parser.add_argument(
        "--i3d", type=path, metavar="FILE",
        help="I3D weights (.safetensors); adds the Fréchet distance of predicted, generated or reconstructed clips",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=path, metavar="PATH",
        help="JSON file for the metrics; without RUN a folder, which also gets a picture of the worst clips",
    )  # fmt: skip
    parser.add_argument(
        "--lpips-weights", metavar="FILE",
        help="LPIPS weights (.safetensors, see `jvgen lpips`) for the perceptual distance; the run's own if omitted, a "
        "Laplacian pyramid's without RUN",
    )  # fmt: skip
    batch = parser.add_argument(
        "--batch-size", type=number(Count), metavar="N", help="clips per batch; 8 for --samples, 2 without RUN"
    )
    parser.add_argument(
        "--vae", type=path, metavar="DIR",
        help="exported folder of an image or video VAE to measure; with RUN, the VAE that made the latents of a run "
        "whose config names none, to decode --samples",
    )  # fmt: skip
    clip_options = _add_clip_options(parser)
    sampler_options = _add_sampler_options(parser)
    vae_only = _add_vae_options(parser)
    parser.set_defaults(
        handler=functools.partial(
            run_evaluate,
            run_only=[*run_only, *clip_options, *sampler_options],
            samples_only=[*sampler_options, batch],
            vae_only=vae_only,
        )
    )


def _add_clip_options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Options that need RUN: what it generates, and what is measured of it."""
    group = parser.add_argument_group("options for generated clips (text-to-video and multi-view runs)")
    return [
        group.add_argument(
            "--samples", type=number(CountOrZero), default=0, metavar="N",
            help="clips, or sets of views, to generate and to measure",
        ),
        group.add_argument(
            "--clip-model", type=path, metavar="DIR",
            help="folder with CLIP's config.json, model.safetensors and tokenizer.json; adds the agreement with "
            "captions and the consistency of backgrounds",
        ),
        group.add_argument(
            "--dinov2", type=path, metavar="DIR",
            help="folder of a DINOv2 (transformers' Dinov2Model); adds the consistency of subjects",
        ),
        group.add_argument("--report", type=path, metavar="FILE", help="HTML file with the measures and some clips"),
    ]  # fmt: skip


def _add_sampler_options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Options that need `--samples`."""
    group = parser.add_argument_group("options for --samples")
    return [
        group.add_argument("--steps", type=number(Count), metavar="N", help="sampler steps; the run's own if omitted"),
        group.add_argument(
            "--guidance", type=number(Scale), metavar="SCALE",
            help="scale of classifier-free guidance; the run's own if omitted",
        ),
        group.add_argument("--seed", type=number(Seed), default=0, metavar="N", help="seed of the generated clips"),
    ]  # fmt: skip


def _add_vae_options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Options that need `--vae` without RUN."""
    group = parser.add_argument_group("options for --vae without RUN")
    return [
        group.add_argument(
            "--image-vae", type=path, metavar="DIR",
            help="exported folder of the image VAE whose latent space the video VAE shares",
        ),
        group.add_argument("--frames", type=number(Frames), default=17, metavar="N", help="frames per clip"),
        group.add_argument(
            "--size", type=frame_size, default=(256, 256), metavar="HxW", help="frame height and width in pixels"
        ),
        group.add_argument(
            "--stride", type=number(Frames), default=1, metavar="N", help="frame stride: take every N-th recorded frame"
        ),
        group.add_argument(
            "--worst", type=number(CountOrZero), default=4, metavar="N",
            help="clips with the lowest PSNR that the picture shows",
        ),
    ]  # fmt: skip


def _add_analyze(commands) -> None:
    parser = add_command(
        commands, "analyze", "measure attention and feature similarity in each layer of a trained video DiT",
        "jvgen analyze runs/demo/text_to_video --out runs/demo/analysis",
        details="Writes analysis.json and pictures: attention by layer, and the cosine similarity of adjacent frames "
        "by layer.",
        handler=run_analyze,
    )  # fmt: skip
    add_run_arguments(parser)
    _add_data_argument(parser)
    parser.add_argument(
        "--timesteps", default="900,600,300,50", metavar="T,T,...", help="diffusion timesteps to analyze, 0 to 999"
    )
    parser.add_argument(
        "--batches", type=number(Count), default=1, metavar="N", help="held-out batches that results are averaged over"
    )
    _add_untrained_argument(parser)
    parser.add_argument(
        "--out", type=path, required=True, metavar="DIR", help="folder for analysis.json and the pictures"
    )


def _add_data_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", metavar="DIR", help="data set folder; the evaluation sources of the run's config if omitted"
    )


def _add_untrained_argument(parser: argparse.ArgumentParser) -> argparse.Action:
    return parser.add_argument(
        "--untrained", action="store_true", help="use randomly initialized parameters instead, as a baseline"
    )


def run_evaluate(
    parsed: argparse.Namespace,
    *,
    run_only: Sequence[argparse.Action],
    samples_only: Sequence[argparse.Action],
    vae_only: Sequence[argparse.Action],
) -> int:
    """Evaluate a run or a VAE."""
    if parsed.run is None and parsed.vae is None:
        raise ValueError("give RUN (a run directory) or --vae DIR (an exported VAE).")
    if parsed.run is None:
        check_foreign(parsed, run_only, "RUN")
    else:
        check_foreign(parsed, vae_only, "--vae and no RUN")
        if not parsed.samples:
            check_foreign(parsed, samples_only, "--samples N")
    if parsed.out is not None:
        check_output("--out", parsed.out, folder=parsed.run is None)
    if parsed.run is None:
        _evaluate_vae(parsed)
        return 0
    from jvgen.runs.evaluation import evaluate_run
    from jvgen.runs.held_out import SamplingOptions

    evaluate_run(
        parsed.run, ema=parsed.ema, step=parsed.step, data=parsed.data, batches=parsed.batches, out=parsed.out,
        untrained=parsed.untrained, i3d=parsed.i3d, clip_model=parsed.clip_model,
        dinov2=parsed.dinov2, lpips=parsed.lpips_weights, vae=parsed.vae,
        report=parsed.report,
        sampling=SamplingOptions(
            samples=parsed.samples, steps=parsed.steps, guidance=parsed.guidance, seed=parsed.seed,
            batch=parsed.batch_size or 8,
        ),
    )  # fmt: skip
    return 0


def _evaluate_vae(parsed: argparse.Namespace) -> None:
    from jvgen.autoencoding.evaluation import evaluate_vae
    from jvgen.evaluation import i3d

    if parsed.data is None:
        raise ValueError("--vae also needs --data DIR: the data set to measure on.")
    evaluate_vae(
        parsed.vae, parsed.data, frames=parsed.frames, size=parsed.size, stride=parsed.stride, batches=parsed.batches,
        batch=parsed.batch_size or 2, image_vae=parsed.image_vae, lpips=parsed.lpips_weights, out=parsed.out,
        worst=parsed.worst, features=None if parsed.i3d is None else i3d.features(parsed.i3d),
    )  # fmt: skip


def run_analyze(parsed: argparse.Namespace) -> int:
    """Analyze the layers of a run."""
    from jvgen.runs.analysis import analyze_run

    check_output("--out", parsed.out, folder=True)
    try:
        timesteps = [float(word) for word in parsed.timesteps.split(",")]
    except ValueError as error:
        raise ValueError(f"--timesteps {parsed.timesteps}: expected comma-separated numbers, as in 900,50.") from error
    analyze_run(
        parsed.run, parsed.out, ema=parsed.ema, step=parsed.step, data=parsed.data, timesteps=timesteps,
        batches=parsed.batches, untrained=parsed.untrained,
    )  # fmt: skip
    return 0
