"""`jvgen data build` of scenes, environments, videos and images."""

import argparse

from jvgen.cli.arguments import add_set_argument, number
from jvgen.cli.build_arguments import (
    add_builder,
    add_captions,
    add_error_budget,
    add_min_frames,
    add_resampling,
    add_transcoding,
    add_validation_fraction,
    add_workers,
    execution_of,
    run_settings,
    video_options,
)
from jvgen.terminal import progress_bar
from jvgen.value_rules import CountOrZero, Records, Seed, Workers


def add_builders(origins) -> None:
    """Add `scenes`, `environment`, `videos` and `images`."""
    _add_scenes(origins)
    _add_environment(origins)
    _add_media(origins, "videos", "build from a folder of .mp4, .webm, .mkv, .mov, ... files")
    _add_media(origins, "images", "build from a folder of .png, .jpeg, .webp or .bmp files")


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
        "set a field of jvgen.runs.recording.RecordingConfig: policy, noise, random_share, steps, size, quality "
        "(repeatable)",
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
    from jvgen.data.builders.folders import build_images, build_videos
    from jvgen.data.builders.jobs import FilterConfig

    with progress_bar(f"reading {parsed.origin}", "files") as report:
        shared = {"captions": parsed.captions, "progress": report, **run_settings(parsed)}
        if parsed.origin == "videos":
            summary = build_videos(parsed.folder, parsed.out, video_options(parsed), **shared)
        else:
            filters = FilterConfig(
                min_height=parsed.min_height, min_width=parsed.min_width, caption_required=not parsed.captions_optional
            )
            summary = build_images(
                parsed.folder, parsed.out, captions_optional=parsed.captions_optional, filters=filters,
                validation=parsed.validation_fraction, **shared,
            )  # fmt: skip
    print(summary)
    return 0
