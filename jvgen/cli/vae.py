"""`jvgen encode` and `jvgen decode`: videos to latents and back, with an exported VAE."""

import argparse
from pathlib import Path

from jvgen.cli.arguments import add_coder_arguments, add_command, check_output, number, path
from jvgen.terminal import progress_bar
from jvgen.value_rules import FrameRate, Quality


def add_commands(commands) -> None:
    """Add `encode` and `decode`."""
    parser = add_command(
        commands, "encode", "encode videos of any length and size as VAE latents",
        "jvgen encode film.mp4 --vae exported/vae --out latents",
        details="Writes NAME.npy (frames, height, width, channels) and NAME.json for each video. Frame counts and "
        "sizes that are no multiple of the VAE's are padded by repeating the last frame, row and column; "
        "`jvgen decode` crops the padding.",
        handler=run_encode,
    )  # fmt: skip
    parser.add_argument("videos", type=path, nargs="+", metavar="VIDEO", help="video or image file")
    add_coder_arguments(parser)
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32", help="dtype of the latents")
    parser = add_command(
        commands, "decode", "decode latents that `jvgen encode` wrote to videos",
        "jvgen decode latents/film.npy --vae exported/vae --out videos",
        handler=run_decode,
    )  # fmt: skip
    parser.add_argument(
        "latents", type=path, nargs="+", metavar="LATENTS", help=".npy file with its .json file beside it"
    )
    add_coder_arguments(parser)
    parser.add_argument(
        "--fps", type=number(FrameRate), metavar="RATE",
        help="frame rate of the video in frames per second; that of the encoded video if omitted",
    )  # fmt: skip
    parser.add_argument(
        "--crf", type=number(Quality), default=18, metavar="N",
        help="constant rate factor of x264, 0 (lossless) to 51 (smallest file)",
    )  # fmt: skip


def run_encode(parsed: argparse.Namespace) -> int:
    """Encode every video."""
    from jvgen.autoencoding.latent_files import encode_file, open_vae
    from jvgen.interop.from_torch import with_variant

    targets = _targets(parsed.videos, parsed.out, ".npy", parsed.overwrite)
    folder = with_variant(parsed.vae, parsed.variant)
    vae, digest = open_vae(folder, parsed.chunk_frames, parsed.compute_dtype)
    for source, target in targets:
        with progress_bar(f"encoding {source.name}", "frames") as report:
            video = encode_file(vae, digest, source, target, dtype=parsed.dtype, report=report)
        frames, height, width = vae.padded_size(video.frames, video.height, video.width)
        size, padded = f"{video.frames} frames of {video.height}x{video.width}", f"{frames} frames of {height}x{width}"
        print(f"{target}: {size}" + (f", padded to {padded}" if size != padded else ""))
    return 0


def run_decode(parsed: argparse.Namespace) -> int:
    """Decode every file of latents."""
    from jvgen.autoencoding.latent_files import decode_file, open_vae, read_latents
    from jvgen.interop.from_torch import with_variant

    images = [read_latents(path)[0].frames_per_second == 0 for path in parsed.latents]
    targets = _targets(parsed.latents, parsed.out, ".mp4", parsed.overwrite)
    folder = with_variant(parsed.vae, parsed.variant)
    vae, digest = open_vae(folder, parsed.chunk_frames, parsed.compute_dtype)
    for (source, target), image in zip(targets, images, strict=True):
        target = target.with_suffix(".png") if image else target
        with progress_bar(f"decoding {source.name}", "frames") as report:
            video = decode_file(
                vae, digest, source, target, frames_per_second=parsed.fps, quality=parsed.crf, report=report
            )
        print(f"{target}: {video.frames} frames of {video.height}x{video.width}")
    return 0


def _targets(sources: list[Path], out: Path, suffix: str, overwrite: bool) -> list[tuple[Path, Path]]:
    """(source, target) pairs; all mistakes are found before the first source is processed."""
    targets = [(source, out / f"{source.stem}{suffix}") for source in sources]
    for source, target in targets:
        if not source.is_file():
            raise ValueError(f"{source}: {'a folder; name the files in it' if source.is_dir() else 'no such file'}.")
        if target.exists() and not overwrite:
            raise ValueError(f"{target} exists; choose another --out, or pass --overwrite.")
    names = [target.name for _, target in targets]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"--out {out}: several sources would be written as {twice[0]}; use one folder for each.")
    check_output("--out", out, folder=True)
    return targets
