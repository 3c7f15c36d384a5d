"""Arguments that the builders of `jvgen data build` share, and what they become."""

import argparse
from typing import TYPE_CHECKING, Any

from jvgen.cli.arguments import Handler, add_command, number
from jvgen.value_rules import Count, CountOrZero, Fraction, FrameRate, Pixels, Seconds, Workers

if TYPE_CHECKING:
    from jvgen.data.builders.execution import Execution, Team
    from jvgen.data.builders.media import VideoOptions


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
        "--part", type=part, default="1/1", metavar="I/N",
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


def execution_of(parsed: argparse.Namespace, team: "Team | None" = None) -> "Execution":
    """The `Execution` of the arguments that all builders have."""
    from jvgen.data.builders.execution import Execution, Team

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


def video_options(parsed: argparse.Namespace) -> "VideoOptions":
    """The `VideoOptions` of the arguments; those that a builder does not have are the defaults."""
    from jvgen.data.builders.jobs import FilterConfig
    from jvgen.data.builders.media import VideoOptions

    given = vars(parsed)
    optional = given.get("captions_optional", False)
    filters = FilterConfig(
        min_frames=given.get("min_frames", 1), min_height=given.get("min_height", 1),
        min_width=given.get("min_width", 1), caption_required=not optional,
    )  # fmt: skip
    return VideoOptions(
        kind=given.get("kind", "dynamic"), shorter_side=parsed.shorter_side, keyframe_every=parsed.keyframe_interval,
        frames_per_second=parsed.fps, scenes=parsed.scenes, captions_optional=optional, filters=filters,
        validation=parsed.validation_fraction,
    )  # fmt: skip


def run_settings(parsed: argparse.Namespace) -> dict[str, Any]:
    """How files are read, for any builder."""
    return {
        "error_budget": parsed.error_budget, "workers": parsed.workers, "overwrite": parsed.overwrite,
        "execution": execution_of(parsed),
    }  # fmt: skip
