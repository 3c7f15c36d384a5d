"""`jvgen data build` of scenes, videos, images, latents and text embeddings; with arguments that all builders share."""

import argparse
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from jvgen.cli.arguments import (
    Handler,
    add_command,
    add_process_arguments,
    add_set_argument,
    frame_size,
    join_processes,
    number,
)
from jvgen.terminal import progress_bar
from jvgen.value_rules import (
    Count,
    CountOrZero,
    Fraction,
    FrameRate,
    Frames,
    Pixels,
    Records,
    Seconds,
    Seed,
    Width,
    Workers,
)

if TYPE_CHECKING:
    from jvgen.data.builders.build_loop import Team

# Seconds for which the processes of a build wait for each other: units are divided before anyone knows how long they
# take. One that ends tells the others at once.
BUILD_SECONDS = 7 * 24 * 3600.0


def add_builders(origins) -> None:
    """Add `scenes`, `environment`, `videos`, `images`, `latents` and `text-embeddings`."""
    _add_scenes(origins)
    _add_environment(origins)
    _add_media(origins, "videos", "build from a folder of .mp4, .webm, .mkv, .mov, ... files")
    _add_media(origins, "images", "build from a folder of .png, .jpeg, .webp or .bmp files")
    _add_latents(origins)
    _add_text_embeddings(origins)


# Shared arguments -----------------------------------------------------------------------------------------------------


def add_builder(origins, name: str, summary: str, example: str, handler: Handler, details: str = ""):
    """Add one builder with `--out` and `--overwrite`; returns its parser."""
    command = f"jvgen data build {name} {example}"
    parser = add_command(origins, name, summary, command, details=details, handler=handler)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the new data set")
    parser.add_argument("--overwrite", action="store_true", help="replace a data set that exists in that folder")
    parser.add_argument(
        "--append", action="store_true", help="add what is new to the data set in that folder, which keeps what it has"
    )
    parser.add_argument(
        "--part", type=part, default=(1, 1), metavar="I/N",
        help="build only the I-th of N parts, into DIR.part-I-of-N; `jvgen data merge` makes a data set of all",
    )  # fmt: skip
    parser.add_argument(
        "--restart", action="store_true", help="remove what an unfinished build has left instead of going on with it"
    )
    parser.add_argument(
        "--file-timeout", type=number(Seconds), default=1800.0, metavar="SECONDS",
        help="give up a file after this time: the library that decodes it hangs",
    )  # fmt: skip
    parser.add_argument(
        "--engine", choices=["local", "ray"], default="local",
        help="where records are made: on this machine, or on the machines of a Ray cluster, which see the same paths",
    )  # fmt: skip
    parser.add_argument(
        "--ray-address", metavar="HOST:PORT", help="the Ray cluster; if omitted, the one that this machine belongs to"
    )
    return parser


def part(text: str) -> tuple[int, int]:
    """`I/N` as numbers, for argparse."""
    number_of, separator, of = text.partition("/")
    if not (separator and number_of.isdecimal() and of.isdecimal() and 1 <= int(number_of) <= int(of)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected I/N with 1 <= I <= N, for example 3/64")
    return int(number_of), int(of)


def execution_of(parsed: argparse.Namespace, team: "Team | None" = None):
    """The `Execution` of the arguments that all builders have."""
    from jvgen.data.builders.build_loop import Execution, Team

    number_of, of = parsed.part
    return Execution(
        part=number_of, parts=of, engine=parsed.engine, address=parsed.ray_address, restart=parsed.restart,
        append=parsed.append, limit=parsed.file_timeout, team=team or Team(),
    )  # fmt: skip


def add_captions(parser: argparse.ArgumentParser) -> None:
    """Add `--captions`."""
    parser.add_argument(
        "--captions", metavar="FILE",
        help=".csv, .tsv or .jsonl table with the columns file and caption; if omitted, captions.csv, .tsv or .jsonl "
        "in DIR, or a .txt file beside each file",
    )  # fmt: skip


def add_validation_fraction(parser: argparse.ArgumentParser, of: str) -> None:
    """Add `--validation-fraction`."""
    parser.add_argument(
        "--validation-fraction", type=number(Fraction), default=0.05, metavar="X",
        help=f"fraction of the {of} held out as the validation split",
    )  # fmt: skip


def add_error_budget(parser: argparse.ArgumentParser, of: str, default: float = 0.0) -> None:
    """Add `--error-budget`."""
    parser.add_argument(
        "--error-budget", type=number(Fraction), default=default, metavar="X",
        help=f"fraction of the {of} that may be missing or corrupt; above it nothing is written",
    )  # fmt: skip


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add `--workers`."""
    parser.add_argument("--workers", type=number(Workers), metavar="N", help="parallel workers; one per CPU if omitted")


def add_min_frames(parser: argparse.ArgumentParser, of: str = "clips") -> None:
    """Add `--min-frames`."""
    parser.add_argument(
        "--min-frames", type=number(CountOrZero), default=1, metavar="N", help=f"skip {of} with fewer frames"
    )


def add_transcoding(parser: argparse.ArgumentParser) -> None:
    """Add `--shorter-side` and `--keyframe-interval`."""
    parser.add_argument(
        "--shorter-side", type=number(Pixels), metavar="PIXELS",
        help="re-encode clips at this length of their shorter side; the files' own bytes are kept if omitted",
    )  # fmt: skip
    parser.add_argument(
        "--keyframe-interval", type=number(Count), metavar="FRAMES",
        help="re-encode clips with a keyframe every FRAMES frames, which makes short windows cheap to decode",
    )  # fmt: skip


def add_resampling(parser: argparse.ArgumentParser) -> None:
    """Add `--fps` and `--scenes`."""
    parser.add_argument(
        "--fps", type=number(FrameRate), metavar="RATE",
        help="resample clips to this many frames per second, by the times of their frames; slower clips are left out",
    )  # fmt: skip
    parser.add_argument(
        "--scenes", choices=["keep", "cut"], default="keep", help="cut: split videos at cuts into a record per scene"
    )


# Scenes ---------------------------------------------------------------------------------------------------------------


def _add_scenes(origins) -> None:
    parser = add_builder(
        origins, "scenes", "render procedural 3-D scenes with exact cameras and captions", "--out data/scenes",
        run_scenes,
    )  # fmt: skip
    parser.add_argument("--train", type=number(Records), default=1000, metavar="N", help="number of training scenes")
    parser.add_argument("--validation", type=number(Records), default=64, metavar="N", help="number of held-out scenes")
    parser.add_argument("--seed", type=number(Seed), default=0, metavar="N", help="random seed of the scenes")
    add_workers(parser)
    add_set_argument(
        parser, "FIELD=VALUE",
        "set a field of jvgen.data.scenes.scenes.SceneConfig, for example frames=16 or kinds.static=0.5 (repeatable)",
    )  # fmt: skip


def run_scenes(parsed: argparse.Namespace) -> int:
    """Render scenes."""
    from jvgen.config import override, validate_tree
    from jvgen.data.builders.scenes import build_scenes
    from jvgen.data.scenes.scenes import SceneConfig

    config = override(SceneConfig(), parsed.assignments)
    validate_tree(config, "scenes")
    with progress_bar("rendering", "scenes") as report:
        summary = build_scenes(
            parsed.out, config, train=parsed.train, validation=parsed.validation, seed=parsed.seed,
            workers=parsed.workers, overwrite=parsed.overwrite, progress=report, execution=execution_of(parsed),
        )  # fmt: skip
    print(summary)
    return 0


# Environments ---------------------------------------------------------------------------------------------------------


def _add_environment(origins) -> None:
    parser = add_builder(
        origins, "environment", "record episodes of an environment, by its expert or at random",
        "metaworld:reach-v3 --train 20 --out data/reach", run_environment,
    )  # fmt: skip
    parser.add_argument("env", metavar="NAME", help="environment, as `jvgen plan --env` takes it")
    parser.add_argument("--train", type=number(Records), default=20, metavar="N", help="number of training episodes")
    parser.add_argument(
        "--validation",
        type=number(Records),
        default=4,
        metavar="N",
        help="number of held-out episodes",
    )
    parser.add_argument("--seed", type=number(Seed), default=0, metavar="N", help="random seed of the episodes")
    parser.add_argument("--workers", type=number(Workers), default=1, metavar="N", help="processes that record")
    add_set_argument(
        parser, "FIELD=VALUE",
        "set a field of jvgen.runs.recording.RecordingConfig: policy, noise, steps, size, quality (repeatable)",
    )  # fmt: skip


def run_environment(parsed: argparse.Namespace) -> int:
    """Record episodes."""
    from jvgen.config import override, validate_tree
    from jvgen.runs.recording import RecordingConfig, record_environment

    config = override(RecordingConfig(), parsed.assignments)
    validate_tree(config)
    with progress_bar("recording", "episodes") as report:
        summary = record_environment(
            parsed.env, parsed.out, config, train=parsed.train, validation=parsed.validation, seed=parsed.seed,
            workers=parsed.workers, overwrite=parsed.overwrite, progress=report, execution=execution_of(parsed),
        )  # fmt: skip
    print(summary)
    return 0


# Folders of videos or images ------------------------------------------------------------------------------------------


def _add_media(origins, name: str, summary: str) -> None:
    parser = add_builder(origins, name, summary, f"my_{name} --out data/{name}", run_media)
    parser.add_argument("folder", metavar="DIR", help="folder with the files, at any depth")
    add_captions(parser)
    parser.add_argument("--captions-optional", action="store_true", help="also include files without a caption")
    parser.add_argument(
        "--min-height",
        type=number(CountOrZero),
        default=1,
        metavar="PIXELS",
        help="skip files with frames lower than this",
    )
    parser.add_argument(
        "--min-width",
        type=number(CountOrZero),
        default=1,
        metavar="PIXELS",
        help="skip files with frames narrower than this",
    )
    add_validation_fraction(parser, "files")
    add_error_budget(parser, "files")
    add_workers(parser)
    if name == "videos":
        parser.add_argument(
            "--kind", choices=["dynamic", "static"], default="dynamic",
            help="kind of the clips: dynamic, or static for a camera that moves through a scene without motion",
        )  # fmt: skip
        add_min_frames(parser)
        add_transcoding(parser)
        add_resampling(parser)


def run_media(parsed: argparse.Namespace) -> int:
    """Build from a folder of videos or images."""
    from jvgen.data.builders.build_loop import FilterConfig
    from jvgen.data.builders.folders import build_images, build_videos

    videos = parsed.origin == "videos"
    filters = FilterConfig(
        min_frames=parsed.min_frames if videos else 1,
        min_height=parsed.min_height,
        min_width=parsed.min_width,
        caption_required=not parsed.captions_optional,
    )
    shared = {
        "captions": parsed.captions, "captions_optional": parsed.captions_optional, "filters": filters,
        "validation": parsed.validation_fraction, "error_budget": parsed.error_budget,
        "workers": parsed.workers, "overwrite": parsed.overwrite, "execution": execution_of(parsed),
    }  # fmt: skip
    with progress_bar(f"reading {parsed.origin}", "files") as report:
        if videos:
            summary = build_videos(
                parsed.folder, parsed.out, kind=parsed.kind, shorter_side=parsed.shorter_side,
                keyframe_every=parsed.keyframe_interval, frames_per_second=parsed.fps, scenes=parsed.scenes,
                progress=report, **shared,
            )  # fmt: skip
        else:
            summary = build_images(parsed.folder, parsed.out, progress=report, **shared)
    print(summary)
    return 0


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
    from jvgen.data.builders.build_loop import Team
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
