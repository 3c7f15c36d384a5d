"""`jvgen data`: build data sets (scenes, videos, images, robot episodes, TFDS, latents) and look at them."""

import argparse
import json
from pathlib import Path

from jvgen.terminal import progress_bar

FORMATS = argparse.ArgumentDefaultsHelpFormatter


def add_data_commands(parser: argparse.ArgumentParser) -> None:
    """Add `build` and `show` to the parser of `jvgen data`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    summary = "make a data set in ArrayRecord"
    build = actions.add_parser(
        "build", help=summary, description=f"{summary[0].upper()}{summary[1:]}.", formatter_class=FORMATS,
        epilog="Example: jvgen data build scenes --out data/scenes",
    )  # fmt: skip
    origins = build.add_subparsers(dest="origin", required=True, metavar="ORIGIN")
    _scenes(origins)
    _media(origins, "videos", "a folder of mp4, webm, mkv, mov, ... files")
    _media(origins, "images", "a folder of png, jpeg, webp or bmp files")
    _robot_episodes(origins)
    _realestate10k(origins)
    _webvid(origins)
    _tfds(origins)
    _latents(origins)
    summary = "a table, a contact sheet and an animation of a data set"
    show = actions.add_parser(
        "show", help=summary, description=f"{summary[0].upper()}{summary[1:]}.", formatter_class=FORMATS,
        epilog="Example: jvgen data show data/scenes --out pictures",
    )  # fmt: skip
    show.add_argument("path", help="data set folder")
    show.add_argument("--split", default="train")
    show.add_argument("--count", type=int, default=8, help="records to show")
    show.add_argument("--out", type=Path, default=None, help="folder for sheet.png and clips.gif")
    show.set_defaults(handler=_run_show)


def frame_size(text: str) -> tuple[int, int]:
    """`HEIGHTxWIDTH` as numbers, for argparse."""
    height, separator, width = text.partition("x")
    if not (separator and height.isdigit() and width.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r}: expected HEIGHTxWIDTH, for example 480x720")
    return int(height), int(width)


def _origin(origins, name: str, summary: str, example: str, run) -> argparse.ArgumentParser:
    description = summary[0].upper() + summary[1:] + "."
    epilog = f"Example: jvgen data build {name} {example}"
    parser = origins.add_parser(name, help=summary, description=description, epilog=epilog, formatter_class=FORMATS)
    parser.add_argument("--out", required=True, help="folder of the new data set")
    parser.add_argument("--overwrite", action="store_true", help="replace a data set that is there")
    parser.set_defaults(handler=run)
    return parser


def _finish(summary) -> int:
    print(summary)
    return 0


# scenes --------------------------------------------------------------------------------------------------------------


def _scenes(origins) -> None:
    parser = _origin(
        origins, "scenes", "procedural 3-D scenes with exact cameras and captions", "--out data/scenes", _run_scenes
    )
    parser.add_argument("--train", type=int, default=1000, help="scenes to train on")
    parser.add_argument("--validation", type=int, default=64, help="held-out scenes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=None, help="processes; one a processor if not given")
    parser.add_argument(
        "--set", dest="assignments", action="append", default=[], metavar="FIELD=VALUE",
        help="a field of jvgen.data.scenes.scenes.SceneConfig, for example frames=16 or kinds.static=0.5 (repeatable)",
    )  # fmt: skip


def _run_scenes(parsed: argparse.Namespace) -> int:
    from jvgen.config import override, validate_tree
    from jvgen.data.builders.scenes import build_scenes
    from jvgen.data.scenes.scenes import SceneConfig

    config = override(SceneConfig(), parsed.assignments)
    validate_tree(config, "scenes")
    with progress_bar("rendering", "scenes") as report:
        summary = build_scenes(
            parsed.out, config, train=parsed.train, validation=parsed.validation, seed=parsed.seed,
            workers=parsed.workers, overwrite=parsed.overwrite, progress=report,
        )  # fmt: skip
    return _finish(summary)


# videos, images ------------------------------------------------------------------------------------------------------


def _media(origins, name: str, summary: str) -> None:
    parser = _origin(origins, name, summary, f"my_{name} --out data/{name}", _run_media)
    parser.add_argument("folder", help="where the files are, at any depth")
    parser.add_argument("--captions", default=None, help="csv or jsonl table with the columns file and caption")
    parser.add_argument("--captions-optional", action="store_true", help="also take files without a caption")
    parser.add_argument("--validation", type=float, default=0.05, help="share of files that is held out")
    parser.add_argument("--min-height", type=int, default=1, help="leave out what is lower, in pixels")
    parser.add_argument("--min-width", type=int, default=1, help="leave out what is narrower, in pixels")
    parser.add_argument(
        "--error-budget", type=float, default=0.0, help="share of files that may be damaged before the build stops"
    )
    parser.add_argument("--workers", type=int, default=None, help="processes; one a processor if not given")
    if name == "videos":
        parser.add_argument("--min-frames", type=int, default=1, help="leave out shorter clips")
        parser.add_argument("--kind", choices=["dynamic", "static"], default="dynamic", help="static: still scenes")
        parser.add_argument("--shorter-side", type=int, default=None, help="encode again at this size")
        parser.add_argument(
            "--keyframe-every", type=int, default=None, help="encode again with a keyframe every N frames"
        )


def _run_media(parsed: argparse.Namespace) -> int:
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
        "validation": parsed.validation, "error_budget": parsed.error_budget, "workers": parsed.workers,
        "overwrite": parsed.overwrite,
    }  # fmt: skip
    with progress_bar(f"reading {parsed.origin}", "files") as report:
        if videos:
            summary = build_videos(
                parsed.folder, parsed.out, kind=parsed.kind, shorter_side=parsed.shorter_side,
                keyframe_every=parsed.keyframe_every, progress=report, **shared,
            )  # fmt: skip
        else:
            summary = build_images(parsed.folder, parsed.out, progress=report, **shared)
    return _finish(summary)


# robot episodes ------------------------------------------------------------------------------------------------------


def _robot_episodes(origins) -> None:
    parser = _origin(
        origins, "robot-episodes", "frames, actions, rewards: npz, hdf5, RLDS (TFDS), or folders of images",
        "metaworld --clip-actions=-1,1 --out data/metaworld", _run_robot_episodes,
    )  # fmt: skip
    parser.add_argument("folder", help="where the files are, at any depth")
    parser.add_argument("--camera", default=None, help="name of the array of frames, where there are several")
    parser.add_argument(
        "--clip-actions", default=None, metavar="LOW,HIGH", help="clip actions, as the simulator they were sent to does"
    )
    parser.add_argument(
        "--action-width", type=int, default=None, help="numbers of an action: shorter ones get zeros, longer are cut"
    )
    parser.add_argument("--no-actions", action="store_true", help="leave actions and rewards out")
    parser.add_argument("--frames-per-second", type=float, default=10.0, help="said of the recordings, for players")
    parser.add_argument("--quality", type=int, default=10, help="constant rate factor of the stored clips, 0 to 51")
    parser.add_argument("--min-frames", type=int, default=1, help="leave out shorter episodes")
    parser.add_argument("--validation", type=float, default=0.05, help="share of episodes held out of every folder")
    parser.add_argument(
        "--error-budget", type=float, default=0.0, help="share of files that may be damaged before the build stops"
    )
    parser.add_argument(
        "--workers", type=int, default=None, help="files read side by side; one a processor if not given"
    )


def _run_robot_episodes(parsed: argparse.Namespace) -> int:
    from jvgen.data.builders.robot_episodes import EpisodeOptions, build_robot_episodes

    bounds = None
    if parsed.clip_actions is not None:
        try:
            low, high = (float(part) for part in parsed.clip_actions.split(","))
        except ValueError as error:
            raise ValueError(f"--clip-actions {parsed.clip_actions!r}: expected LOW,HIGH, for example -1,1.") from error
        bounds = (low, high)
    options = EpisodeOptions(
        camera=parsed.camera, clip_actions=bounds, action_width=parsed.action_width,
        frames_per_second=parsed.frames_per_second, quality=parsed.quality,
        actions=not parsed.no_actions,
    )  # fmt: skip
    with progress_bar("reading episodes", "files") as report:
        summary = build_robot_episodes(
            parsed.folder, parsed.out, options, validation=parsed.validation, min_frames=parsed.min_frames,
            error_budget=parsed.error_budget, workers=parsed.workers, overwrite=parsed.overwrite, progress=report,
        )  # fmt: skip
    return _finish(summary)


# RealEstate10K, WebVid -----------------------------------------------------------------------------------------------


def _realestate10k(origins) -> None:
    parser = _origin(
        origins, "realestate10k", "clips of still scenes with their cameras",
        "cameras/train --media videos --out data/realestate10k", _run_realestate10k,
    )  # fmt: skip
    parser.add_argument("cameras", help="folder of camera files, ID.txt, at any depth")
    parser.add_argument(
        "--media", required=True, help="folder with ID.mp4 (a frame for each camera), KEY.mp4 (whole), or ID/TIME.png"
    )
    parser.add_argument("--captions", default=None, help="csv or jsonl table with the columns file and caption")
    _clip_options(parser, error_budget=1.0)


def _webvid(origins) -> None:
    parser = _origin(
        origins, "webvid", "moving clips of a csv table", "results_2M_train.csv --videos videos --out data/webvid",
        _run_webvid,
    )  # fmt: skip
    parser.add_argument("table", help="csv with the columns videoid and name")
    parser.add_argument("--videos", required=True, help="folder with VIDEOID.mp4 at any depth")
    _clip_options(parser, error_budget=0.0)


def _clip_options(parser: argparse.ArgumentParser, error_budget: float) -> None:
    parser.add_argument("--validation", type=float, default=0.05, help="share of clips that is held out")
    parser.add_argument("--min-frames", type=int, default=1, help="leave out shorter clips")
    parser.add_argument("--shorter-side", type=int, default=None, help="encode again at this size")
    parser.add_argument("--keyframe-every", type=int, default=None, help="frames between keyframes of what is encoded")
    parser.add_argument(
        "--error-budget", type=float, default=error_budget,
        help="share of clips that may be missing or damaged before the build stops",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, default=None, help="clips read side by side; one a processor if not given"
    )


def _clip_settings(parsed: argparse.Namespace) -> dict:
    from jvgen.data.builders.build_loop import FilterConfig

    return {
        "shorter_side": parsed.shorter_side, "keyframe_every": parsed.keyframe_every,
        "filters": FilterConfig(min_frames=parsed.min_frames), "validation": parsed.validation,
        "error_budget": parsed.error_budget, "workers": parsed.workers, "overwrite": parsed.overwrite,
    }  # fmt: skip


def _run_realestate10k(parsed: argparse.Namespace) -> int:
    from jvgen.data.builders.realestate10k import build_realestate10k

    with progress_bar("reading clips", "clips") as report:
        summary = build_realestate10k(
            parsed.cameras,
            parsed.media,
            parsed.out,
            captions=parsed.captions,
            progress=report,
            **_clip_settings(parsed),
        )
    return _finish(summary)


def _run_webvid(parsed: argparse.Namespace) -> int:
    from jvgen.data.builders.webvid import build_webvid

    with progress_bar("reading videos", "files") as report:
        summary = build_webvid(parsed.table, parsed.videos, parsed.out, progress=report, **_clip_settings(parsed))
    return _finish(summary)


# TFDS ----------------------------------------------------------------------------------------------------------------


def _tfds(origins) -> None:
    parser = _origin(origins, "tfds", "an image data set that TFDS knows", "mnist --out data/mnist", _run_tfds)
    parser.add_argument("name", help="registered name, or the folder of a prepared data set")
    parser.add_argument("--train-split", default="train", help="TFDS split to train on")
    parser.add_argument("--validation-split", default=None, help="TFDS split that is held out")
    parser.add_argument("--image-key", default="image", help="feature that holds the image")
    parser.add_argument("--caption-key", default=None, help="feature with the caption or class label")
    parser.add_argument("--data-dir", default=None, help="where TFDS keeps its data sets")
    parser.add_argument("--limit", type=int, default=None, help="at most so many images of a split")


def _run_tfds(parsed: argparse.Namespace) -> int:
    from jvgen.data.builders.tfds_images import build_tfds_images

    with progress_bar("reading images", "images") as report:
        summary = build_tfds_images(
            parsed.name, parsed.out, train_split=parsed.train_split, validation_split=parsed.validation_split,
            image_key=parsed.image_key, caption_key=parsed.caption_key, data_dir=parsed.data_dir, limit=parsed.limit,
            overwrite=parsed.overwrite, progress=report,
        )  # fmt: skip
    return _finish(summary)


# latents -------------------------------------------------------------------------------------------------------------


def _latents(origins) -> None:
    parser = _origin(
        origins, "latents", "VAE latents of another data set, so that training never runs the VAE",
        "data/videos --vae exported/vae --size 256x256 --out data/latents", _run_latents,
    )  # fmt: skip
    parser.add_argument("source", help="data set folder with clips")
    parser.add_argument("--vae", required=True, help="exported folder of an image or video VAE (`jvgen export`)")
    parser.add_argument("--size", type=frame_size, required=True, metavar="HxW", help="what the VAE sees")
    parser.add_argument(
        "--frames", type=int, default=None,
        help="at most so many frames of a clip; a video VAE of 4 frames a latent takes the largest 4n + 1",
    )  # fmt: skip
    parser.add_argument("--stride", type=int, default=1, help="distance between frames kept")
    parser.add_argument("--batch", type=int, default=16, help="frames encoded together")
    parser.add_argument("--keep-clips", action="store_true", help="store the pixels beside the latents")


def _run_latents(parsed: argparse.Namespace) -> int:
    from jvgen.autoencoding.encoding import FrameEncoder
    from jvgen.data.builders.latents import build_latents
    from jvgen.interop.digest import content_digest

    height, width = parsed.size
    encoder = FrameEncoder(parsed.vae, height, width, batch=parsed.batch)
    with progress_bar("encoding", "records") as report:
        summary = build_latents(
            parsed.source, parsed.out, encoder, encoder_digest=content_digest(parsed.vae), height=height,
            width=width, frames=parsed.frames, stride=parsed.stride, group=encoder.group,
            keep_clips=parsed.keep_clips, overwrite=parsed.overwrite, progress=report,
        )  # fmt: skip
    statistics = encoder.statistics()
    print(summary)
    mean, deviation = statistics["mean"], statistics["deviation"]
    scale = f"{1 / deviation:.6g}" if deviation else "1"
    print(
        f"latents have mean {mean:.4f} and deviation {deviation:.4f}: train on them with task.latent_shift={mean:.6g} "
        f"task.latent_scale={scale}"
    )
    (Path(parsed.out) / "latent_statistics.json").write_text(json.dumps(statistics, indent=1))
    return 0


# show ----------------------------------------------------------------------------------------------------------------


def _run_show(parsed: argparse.Namespace) -> int:
    from jvgen.data.store.show import show

    shown = show(parsed.path, parsed.split, parsed.count)
    print(shown.text, end="")
    if parsed.out is not None:
        parsed.out.mkdir(parents=True, exist_ok=True)
        (parsed.out / "sheet.png").write_bytes(shown.sheet)
        (parsed.out / "clips.gif").write_bytes(shown.animation)
        print(f"wrote {parsed.out / 'sheet.png'} and {parsed.out / 'clips.gif'}")
    return 0
