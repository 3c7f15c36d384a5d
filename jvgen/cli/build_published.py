"""`jvgen data build` of data sets in others' formats: robots, posed images, tables, WebDataset, WebVid, TFDS."""

import argparse

from jvgen.cli.arguments import number
from jvgen.cli.build_arguments import (
    add_builder,
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
from jvgen.value_rules import Count, FrameRate, Quality, Records


def add_builders(origins) -> None:
    """Add `robot-episodes`, `lerobot`, `realestate10k`, `posed`, `table`, `webdataset`, `webvid` and `tfds`."""
    _add_robot_episodes(origins)
    _add_lerobot(origins)
    _add_realestate10k(origins)
    _add_posed(origins)
    _add_table(origins)
    _add_webdataset(origins)
    _add_webvid(origins)
    _add_tfds(origins)


# Robot episodes -------------------------------------------------------------------------------------------------------


def _add_robot_episodes(origins) -> None:
    parser = add_builder(
        origins, "robot-episodes", "build from robot episodes with frames, actions and rewards",
        "metaworld --clip-actions=-1,1 --out data/metaworld", run_robot_episodes,
        details="Reads .npz, .hdf5 and RLDS (TFDS) files, and folders of images.",
    )  # fmt: skip
    parser.add_argument("folder", metavar="DIR", help="folder with the files, at any depth")
    parser.add_argument(
        "--no-checksums", action="store_true",
        help="do not check the checksums of TFRecord files, for programs that write zeros",
    )  # fmt: skip
    parser.add_argument(
        "--fps", type=number(FrameRate), default=10.0, metavar="RATE",
        help="frame rate to record in the clips' metadata, in frames per second",
    )  # fmt: skip
    _add_episode_arguments(parser, "episodes of every folder", "files")


def _add_episode_arguments(parser: argparse.ArgumentParser, held_out: str, corrupt: str) -> None:
    """What robot episodes of all formats have."""
    parser.add_argument(
        "--camera", metavar="NAME", help="name of the array that holds the frames; needed if files hold several"
    )
    parser.add_argument(
        "--clip-actions", metavar="LOW,HIGH", help="clip actions to this range, as the simulator did that recorded them"
    )
    parser.add_argument(
        "--action-width", type=number(Count), metavar="N",
        help="components per action: shorter actions are padded with zeros, longer ones cut; as recorded if omitted",
    )  # fmt: skip
    parser.add_argument("--no-actions", action="store_true", help="store no actions and rewards")
    parser.add_argument(
        "--crf", type=number(Quality), default=10, metavar="N",
        help="constant rate factor of x264 for the stored clips, 0 (lossless) to 51 (smallest file)",
    )  # fmt: skip
    add_min_frames(parser, "episodes")
    add_validation_fraction(parser, held_out)
    add_error_budget(parser, corrupt)
    add_workers(parser)


def _episode_options(parsed: argparse.Namespace, **others):
    from jvgen.data.builders.robot_episodes import EpisodeOptions

    bounds = None
    if parsed.clip_actions is not None:
        try:
            low, high = (float(part) for part in parsed.clip_actions.split(","))
        except ValueError as error:
            raise ValueError(f"--clip-actions {parsed.clip_actions!r}: expected LOW,HIGH, for example -1,1.") from error
        bounds = (low, high)
    return EpisodeOptions(
        camera=parsed.camera, clip_actions=bounds, action_width=parsed.action_width, quality=parsed.crf,
        actions=not parsed.no_actions, **others,
    )  # fmt: skip


def _episode_settings(parsed: argparse.Namespace) -> dict:
    return {
        "validation": parsed.validation_fraction, "min_frames": parsed.min_frames, **run_settings(parsed)
    }  # fmt: skip


def run_robot_episodes(parsed: argparse.Namespace) -> int:
    """Build from robot episodes."""
    from jvgen.data.builders.robot_episodes import build_robot_episodes

    options = _episode_options(parsed, frames_per_second=parsed.fps, checksums=not parsed.no_checksums)
    with progress_bar("reading episodes", "files") as report:
        summary = build_robot_episodes(parsed.folder, parsed.out, options, progress=report, **_episode_settings(parsed))
    print(summary)
    return 0


def _add_lerobot(origins) -> None:
    parser = add_builder(
        origins, "lerobot", "build from a LeRobot data set (v3): episodes with frames, actions and rewards",
        "aloha --camera top --out data/aloha", run_lerobot,
    )  # fmt: skip
    parser.add_argument("folder", metavar="DIR", help="folder of the data set, with meta/info.json")
    _add_episode_arguments(parser, "episodes", "episodes")


def run_lerobot(parsed: argparse.Namespace) -> int:
    """Build from a LeRobot data set."""
    from jvgen.data.builders.lerobot import build_lerobot

    options = _episode_options(parsed)
    with progress_bar("reading episodes", "episodes") as report:
        summary = build_lerobot(parsed.folder, parsed.out, options, progress=report, **_episode_settings(parsed))
    print(summary)
    return 0


# RealEstate10K, posed images, tables, WebDataset, WebVid -----------------------------------------------------


def _add_realestate10k(origins) -> None:
    parser = add_builder(
        origins, "realestate10k", "build from RealEstate10K: clips of static scenes with their cameras",
        "cameras/train --media videos --out data/realestate10k", run_realestate10k,
    )  # fmt: skip
    parser.add_argument("cameras", metavar="DIR", help="folder of camera files, ID.txt, at any depth")
    parser.add_argument(
        "--media", required=True, metavar="DIR",
        help="folder with ID.mp4 (one frame per camera), KEY.mp4 (whole videos), or ID/TIME.png",
    )  # fmt: skip
    parser.add_argument("--captions", metavar="FILE", help=".csv or .jsonl table with the columns file and caption")
    _add_clip_arguments(parser, error_budget=1.0)


POSED = ("nerfstudio", "colmap", "co3d", "spatialvid")  # `jvgen.data.builders.posed.FORMATS`, without importing it


def _add_posed(origins) -> None:
    parser = add_builder(
        origins, "posed", "build from images or videos whose cameras other programs have found",
        "DL3DV --format nerfstudio --out data/dl3dv", run_posed,
        details="nerfstudio: SCENE/transforms.json (DL3DV). colmap: SCENE/sparse/0 and SCENE/images (MVImgNet). co3d: "
        "CATEGORY/frame_annotations.jgz (CO3Dv2). spatialvid: annotations/GROUP/CLIP and videos/GROUP/CLIP.mp4. Images "
        "of lenses with distortion are undistorted.",
    )  # fmt: skip
    parser.add_argument("folder", metavar="DIR", help="folder of the data set; scenes may be at any depth")
    parser.add_argument("--format", choices=POSED, required=True, help="format of the camera files")
    parser.add_argument(
        "--captions", metavar="FILE",
        help=".csv or .jsonl table with the columns file (folder of the scene in DIR) and caption",
    )  # fmt: skip
    parser.add_argument(
        "--fps", type=number(FrameRate), default=10.0, metavar="RATE",
        help="frame rate to record where the cameras have no times, in frames per second",
    )  # fmt: skip
    _add_clip_arguments(parser, error_budget=0.0)


def _add_table(origins) -> None:
    parser = add_builder(
        origins, "table", "build from videos and images that a table lists: .csv, .tsv, .jsonl or .parquet",
        "OpenVid-1M.csv --files videos --out data/openvid", run_table,
        details="Knows the columns of OpenVid, Koala-36M and Panda-70M. The other columns become columns of the data "
        "set.",
    )  # fmt: skip
    parser.add_argument("table", metavar="TABLE", help="the table, or a folder of tables")
    parser.add_argument("--files", required=True, metavar="DIR", help="folder with the files, at any depth")
    parser.add_argument(
        "--file-column",
        metavar="NAME",
        help="column with the path, name, id or URL of the file; by its name if omitted",
    )
    parser.add_argument("--caption-column", metavar="NAME", help="column with the caption; by its name if omitted")
    parser.add_argument(
        "--times", choices=["cut", "ignore"],
        help="of a table with times: cut the clips out of whole videos, or ignore them where the files are the clips",
    )  # fmt: skip
    parser.add_argument("--captions-optional", action="store_true", help="also include rows without a caption")
    _add_video_arguments(parser)


def _add_webdataset(origins) -> None:
    parser = add_builder(
        origins, "webdataset", "build from videos or images in the tar shards of WebDataset",
        "shards --out data/videos", run_webdataset,
        details="Captions are in KEY.txt or KEY.json; numbers and short texts of KEY.json become columns.",
    )  # fmt: skip
    parser.add_argument("folder", metavar="DIR", help="folder with the .tar files, at any depth")
    parser.add_argument(
        "--media",
        metavar="SUFFIX",
        help="suffix of the videos or images, such as mp4; needed where samples have several",
    )
    parser.add_argument(
        "--caption-field", default="caption", metavar="NAME", help="field of KEY.json with the caption or captions"
    )
    parser.add_argument(
        "--columns", nargs="+", metavar="NAME", help="fields of KEY.json that become columns; all if omitted"
    )
    parser.add_argument("--captions-optional", action="store_true", help="also include samples without a caption")
    _add_video_arguments(parser)


def _add_webvid(origins) -> None:
    parser = add_builder(
        origins, "webvid", "build from WebVid: captioned clips listed in a .csv table",
        "results_2M_train.csv --videos videos --out data/webvid", run_webvid,
    )  # fmt: skip
    parser.add_argument("table", metavar="TABLE", help=".csv table with the columns videoid and name (the caption)")
    parser.add_argument("--videos", required=True, metavar="DIR", help="folder with VIDEOID.mp4 files, at any depth")
    _add_video_arguments(parser)


def _add_clip_arguments(parser: argparse.ArgumentParser, error_budget: float) -> None:
    add_min_frames(parser)
    add_transcoding(parser)
    add_validation_fraction(parser, "recordings, with all their clips,")
    add_error_budget(parser, "clips", error_budget)
    add_workers(parser)


def _add_video_arguments(parser: argparse.ArgumentParser) -> None:
    _add_clip_arguments(parser, error_budget=0.0)
    add_resampling(parser)


def _clip_settings(parsed: argparse.Namespace) -> dict:
    """Of clips with cameras."""
    from jvgen.data.builders.jobs import FilterConfig

    return {
        "filters": FilterConfig(min_frames=parsed.min_frames), "validation": parsed.validation_fraction,
        **run_settings(parsed),
    }  # fmt: skip


def run_realestate10k(parsed: argparse.Namespace) -> int:
    """Build from RealEstate10K."""
    from jvgen.data.builders.realestate10k import build_realestate10k

    with progress_bar("reading clips", "clips") as report:
        summary = build_realestate10k(
            parsed.cameras, parsed.media, parsed.out, captions=parsed.captions, shorter_side=parsed.shorter_side,
            keyframe_every=parsed.keyframe_interval, progress=report, **_clip_settings(parsed),
        )  # fmt: skip
    print(summary)
    return 0


def run_posed(parsed: argparse.Namespace) -> int:
    """Build from images or videos with cameras."""
    from jvgen.data.builders.posed import PosedOptions, build_posed

    options = PosedOptions(parsed.shorter_side, parsed.keyframe_interval, parsed.fps)
    with progress_bar("reading scenes", "scenes") as report:
        summary = build_posed(
            parsed.folder, parsed.out, parsed.format, options, captions=parsed.captions, progress=report,
            **_clip_settings(parsed),
        )  # fmt: skip
    print(summary)
    return 0


def run_table(parsed: argparse.Namespace) -> int:
    """Build from a table."""
    from jvgen.data.builders.tables import TableColumns, build_table

    columns = TableColumns(parsed.file_column, parsed.caption_column, parsed.times)
    with progress_bar("reading files", "files") as report:
        summary = build_table(
            parsed.table, parsed.files, parsed.out, columns, video_options(parsed), progress=report,
            **run_settings(parsed),
        )  # fmt: skip
    print(summary)
    return 0


def run_webdataset(parsed: argparse.Namespace) -> int:
    """Build from tar shards."""
    from jvgen.data.builders.webdataset import build_webdataset

    with progress_bar("reading samples", "samples") as report:
        summary = build_webdataset(
            parsed.folder, parsed.out, video_options(parsed), media=parsed.media, caption_field=parsed.caption_field,
            columns=parsed.columns, progress=report, **run_settings(parsed),
        )  # fmt: skip
    print(summary)
    return 0


def run_webvid(parsed: argparse.Namespace) -> int:
    """Build from WebVid."""
    from jvgen.data.builders.webvid import build_webvid

    with progress_bar("reading videos", "files") as report:
        summary = build_webvid(
            parsed.table, parsed.videos, parsed.out, video_options(parsed), progress=report, **run_settings(parsed)
        )
    print(summary)
    return 0


# TFDS -----------------------------------------------------------------------------------------------------------------


def _add_tfds(origins) -> None:
    parser = add_builder(
        origins, "tfds", "build from an image data set of TensorFlow Datasets", "mnist --out data/mnist", run_tfds
    )
    parser.add_argument("name", metavar="NAME", help="registered name, or the folder of a prepared TFDS data set")
    parser.add_argument("--train-split", default="train", metavar="NAME", help="TFDS split for training")
    parser.add_argument("--validation-split", metavar="NAME", help="TFDS split to hold out; none if omitted")
    parser.add_argument("--image-key", default="image", metavar="KEY", help="feature that holds the image")
    parser.add_argument(
        "--caption-key",
        metavar="KEY",
        help="feature that holds the caption or class label; caption, captions or label, if there is one, if omitted",
    )
    parser.add_argument("--data-dir", metavar="DIR", help="folder of TFDS data sets; TFDS's default if omitted")
    parser.add_argument(
        "--limit", type=number(Records), metavar="N", help="maximum number of images per split; all if omitted"
    )


def run_tfds(parsed: argparse.Namespace) -> int:
    """Build from TFDS."""
    from jvgen.data.builders.tfds_images import build_tfds_images

    with progress_bar("reading images", "images") as report:
        summary = build_tfds_images(
            parsed.name, parsed.out, train_split=parsed.train_split, validation_split=parsed.validation_split,
            image_key=parsed.image_key, caption_key=parsed.caption_key, data_dir=parsed.data_dir, limit=parsed.limit,
            overwrite=parsed.overwrite, progress=report, execution=execution_of(parsed),
        )  # fmt: skip
    print(summary)
    return 0
