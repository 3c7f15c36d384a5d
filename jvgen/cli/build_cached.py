"""`jvgen data build` of latents and text embeddings: data sets with what frozen networks compute of others."""

import argparse
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from jvgen.cli.arguments import add_process_arguments, frame_size, join_processes, number
from jvgen.cli.build_arguments import add_builder, execution_of
from jvgen.terminal import progress_bar
from jvgen.value_rules import Count, Frames, Width

if TYPE_CHECKING:
    from jvgen.data.builders.execution import Team

# Seconds for which the processes of a build wait for each other: units are divided before anyone knows how long they
# take. One that ends tells the others at once.
BUILD_SECONDS = 7 * 24 * 3600.0


def add_builders(origins) -> None:
    """Add `latents` and `text-embeddings`."""
    _add_latents(origins)
    _add_text_embeddings(origins)


# Latents --------------------------------------------------------------------------------------------------------------


def _add_latents(origins) -> None:
    parser = add_builder(
        origins, "latents", "encode another data set as VAE latents, so that training does not run the VAE",
        "data/videos --vae exported/vae --size 256x256 --out data/latents", run_latents,
        details="Prints the task.latent_shift and task.latent_scale that normalize the latents; of parts, `jvgen data "
        "merge` does.",
    )  # fmt: skip
    parser.add_argument("source", metavar="DIR", help="data set folder with the clips")
    parser.add_argument(
        "--vae", required=True, metavar="DIR", help="exported folder of an image or video VAE (`jvgen export`)"
    )
    parser.add_argument(
        "--size", type=frame_size, required=True, action="append", metavar="HxW",
        help="frame height and width in pixels that clips are resized to before encoding (repeatable: each clip takes "
        "the one whose aspect ratio is nearest to its own)",
    )  # fmt: skip
    parser.add_argument(
        "--frames", type=number(Frames), metavar="N",
        help="encode at most the first N frames of a clip; a video VAE with temporal compression 4 takes the largest "
        "4n + 1 among them",
    )  # fmt: skip
    parser.add_argument(
        "--stride", type=number(Frames), default=1, metavar="N", help="frame stride: encode every N-th recorded frame"
    )
    parser.add_argument(
        "--windows", type=number(Count), default=1, metavar="N",
        help="encode N windows of --frames frames of each clip, evenly spaced over it, a record each",
    )  # fmt: skip
    parser.add_argument(
        "--flips", action="store_true", help="also encode mirrored windows, except of records with cameras or actions"
    )
    parser.add_argument(
        "--batch-size", type=number(Count), default=16, metavar="N", help="frames that a device encodes at once"
    )
    parser.add_argument("--keep-clips", action="store_true", help="also store the pixels")
    add_process_arguments(parser)


def run_latents(parsed: argparse.Namespace) -> int:
    """Encode a data set, with the devices of all processes."""
    from jvgen.parallel import failing

    with failing.fail_fast(), joined(parsed) as team:
        from jvgen.autoencoding.encoding import ClipEncoder
        from jvgen.data.builders.latents import LatentsConfig, build_latents
        from jvgen.interop.digest import content_digest

        encoder = ClipEncoder(parsed.vae, parsed.size, batch=parsed.batch_size)
        config = LatentsConfig(
            sizes=tuple(parsed.size), frames=parsed.frames, stride=parsed.stride, windows=parsed.windows,
            flips=parsed.flips, keep_clips=parsed.keep_clips,
        )  # fmt: skip
        with progress_bar("encoding", "records") as report:
            summary = build_latents(
                parsed.source, parsed.out, encoder, config, encoder_digest=content_digest(parsed.vae),
                group=encoder.frames_per_latent, overwrite=parsed.overwrite, progress=report,
                execution=execution_of(parsed, team),
            )  # fmt: skip
        if team.index == 0:
            print(summary)
            if parsed.part[1] == 1:
                report_latents(parsed.out)
    return 0


@contextlib.contextmanager
def joined(parsed: argparse.Namespace) -> Iterator["Team"]:
    """Join the other processes of a build, if there are any; at the end they wait for each other."""
    join_processes(parsed)
    from jvgen.data.builders.execution import Team
    from jvgen.parallel import processes

    team = Team(processes.index(), processes.count(), lambda name: processes.barrier(name, BUILD_SECONDS))
    yield team
    team.wait("the end of the build")


def report_latents(folder: str) -> None:
    """Write the statistics of the latents of a data set and print how they are normalized; nothing for one without."""
    from jvgen.data.store.sources import read_metadata

    if "latents" not in read_metadata(folder):
        return
    from jvgen.autoencoding.latent_statistics import write_latent_statistics

    statistics = write_latent_statistics(folder)
    mean, std = statistics["mean"], statistics["deviation"]
    scale = f"{1 / std:.6g}" if std else "1"
    print(
        f"latents have mean {mean:.4f} and standard deviation {std:.4f}: normalize them in training with "
        f"task.latent_shift={mean:.6g} task.latent_scale={scale}"
    )


# Embeddings of captions -----------------------------------------------------------------------------------------------


def _add_text_embeddings(origins) -> None:
    parser = add_builder(
        origins, "text-embeddings",
        "copy another data set with T5's embeddings of its captions, so that training does not run T5",
        "data/latents --t5 CogVideoX-2b/text_encoder --tokenizer CogVideoX-2b/tokenizer --out data/latents_with_text",
        run_text_embeddings, details="Train from them with task.text.embeddings=DIR.",
    )  # fmt: skip
    parser.add_argument("source", metavar="DIR", help="data set folder with captions, of latents or pixels")
    parser.add_argument("--t5", required=True, metavar="DIR", help="exported or transformers folder of a T5 encoder")
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="folder with tokenizer.json or spiece.model")
    parser.add_argument(
        "--length", type=number(Width), default=226, metavar="N", help="tokens per caption: task.text.length"
    )
    parser.add_argument(
        "--padding", choices=["attended", "zeros"], default="attended",
        help="task.text.padding: attended, as CogVideoX, stores --length embeddings of each caption; zeros as many as "
        "it has tokens, for runs that are trained so",
    )  # fmt: skip
    parser.add_argument(
        "--compute-dtype", choices=["float32", "bfloat16"], default="bfloat16",
        help="dtype that T5 computes in: that of the run, training.precision.compute_dtype",
    )  # fmt: skip
    parser.add_argument(
        "--batch-size", type=number(Count), default=8, metavar="N", help="captions that a device embeds at once"
    )
    add_process_arguments(parser)


def run_text_embeddings(parsed: argparse.Namespace) -> int:
    """Embed the captions of a data set, with the devices of all processes."""
    from jvgen.parallel import failing

    with failing.fail_fast(), joined(parsed) as team:
        from jvgen.data.builders.text_embeddings import build_text_embeddings
        from jvgen.interop.from_torch import read_config
        from jvgen.models.t5.config import T5Config
        from jvgen.tasks.caption_encoder import T5Captions
        from jvgen.tasks.text import TextConfig

        architecture = read_config(parsed.t5)
        if not isinstance(architecture, T5Config):
            raise ValueError(f"--t5 {parsed.t5}: holds a {type(architecture).__name__}, not a T5 encoder.")
        config = TextConfig(
            encoder=architecture, length=parsed.length, weights=parsed.t5, tokenizer=parsed.tokenizer,
            padding=parsed.padding,
        )  # fmt: skip
        encoder = T5Captions(config, compute_dtype=parsed.compute_dtype, batch=parsed.batch_size)
        with progress_bar("embedding", "records") as report:
            summary = build_text_embeddings(
                parsed.source, parsed.out, encoder, made_with=encoder.made_with(), overwrite=parsed.overwrite,
                progress=report, execution=execution_of(parsed, team),
            )  # fmt: skip
        if team.index == 0:
            print(summary)
    return 0
