"""Sample several views of a scene from a prompt and cameras: a file per view, a grid, and an epipolar check sheet."""

import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from jvgen.evaluation.contact_sheets import png_bytes
from jvgen.evaluation.epipolar_sheets import epipolar_sheet
from jvgen.geometry import paths
from jvgen.geometry.camera_file import CameraTrack, read_cameras, write_cameras
from jvgen.geometry.cameras import Cameras, relative, resized_and_cropped, share_a_center
from jvgen.runs.clip_folder import Clip, note_clips, plan_clips, write_clip
from jvgen.runs.generation import clip_rate, generate_in_batches, sample_request, slot_of
from jvgen.runs.given_files import NOTHING, GivenFiles
from jvgen.runs.inference import LoadedRun, open_run, read_experiment, with_vae
from jvgen.storage import Path, as_path, write_bytes
from jvgen.tasks.given_frames import GivenPixels
from jvgen.tasks.multiview import MAX_VIEWS
from jvgen.tasks.task import SampleRequest
from jvgen.training.experiment import Experiment

MAX_PROMPTS = 1 << 14  # views of more would draw the same noise


def sample_views(
    run: Path,
    prompts: Sequence[str],
    out: Path,
    *,
    cameras: Sequence[str],
    views: int | None = None,
    distance: float = 0.5,
    shared_world_frame: bool = False,
    ema: str | None = None,
    step: int | None = None,
    count: int = 1,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    batch: int | None = None,
    untrained: bool = False,
    vae: Path | None = None,
    given: GivenFiles = NOTHING,
) -> list[Path]:
    """Generate `count` sets of views per prompt as files.

    Args:
      run: run directory of a multi-view run.
      prompts: texts.
      out: folder; each set gets a folder in it, with view_0.mp4, view_0.txt (its cameras), ..., grid.mp4, epipolar.png.
      cameras: the name of a path (see `jvgen.geometry.paths.PATHS`), or one camera file per view.
      views: how many; by default as many as there are camera files, or 2.
      distance: how far named paths go.
      shared_world_frame: camera files share a world frame; otherwise views start at the same camera, as in training.
      ema, step, untrained: which weights, see `jvgen.runs.inference.open_run`.
      frames, size, steps, guidance: see `jvgen.runs.sampling.sample_run`.
      seed: set i of prompt p depends on (seed, p, i) only.
      batch: sets per batch; by default the fewest whose clips divide over the devices.
      vae: folder of the VAE that made the latents of a run that names none.
      given: images that the views are made from: one for each view, in order, or one for all.

    Returns:
      The folders, in order.

    Raises:
      ValueError: a request or cameras that the run cannot serve, a batch that does not divide over the devices, or a
        folder with sets of another request.
      CheckpointError: no such run, or no valid checkpoint.
      NotFinite: clips that hold NaN or infinity; the others are written, see `jvgen.runs.faults`.
    """
    experiment = read_experiment(run)
    check_views(experiment)
    experiment = with_vae(experiment, vae)
    request = sample_request(experiment, frames, size, steps, guidance, given=given)
    chosen = read_views(cameras, views, request, distance=distance, shared_world_frame=shared_world_frame)
    number = chosen.intrinsics.shape[0]
    _check_given(given, number)
    for one, other in pairs_without_baseline(chosen):
        print(
            f"views {one} and {other} have no baseline: their camera centers coincide in every frame, so "
            "epipolar lines are not defined; random directions are used instead."
        )
    if len(prompts) > MAX_PROMPTS:
        raise ValueError(f"{len(prompts)} prompts: at most {MAX_PROMPTS} with several views.")
    if out.suffix:
        raise ValueError(f"--out {out}: several views are several files; give a folder.")
    loaded = open_run(run, ema, step, untrained, vae=vae)
    batch = fitting_batch(batch, number, loaded.devices)
    plan = plan_clips(prompts, count, out, frames=2, batch=batch)
    sets = [Clip(clip.path.with_suffix(""), clip.prompt, clip.slot) for clip in plan]
    asked = {
        "cameras": list(cameras), "views": number, "distance": distance, "one_world": shared_world_frame, "seed": seed,
        "ema": ema or "best", "untrained": untrained, "steps": steps, "guidance": guidance, "frames": request.frames,
        "height": request.height, "width": request.width, "step": loaded.step, **given.digests(),
        **({} if vae is None else {"vae": str(vae)}),
    }  # fmt: skip
    note_clips(out, [{"file": one.path.name, "prompt": prompts[one.prompt], **asked} for one in sets])
    todo = [one for one in sets if not (one.path / "grid.mp4").exists()]
    if todo:
        began = time.perf_counter()
        wanted = [(one.prompt, one.slot) for one in todo]
        for index, videos in _generate(loaded, prompts, wanted, chosen, request, seed, batch, given):
            write_views(todo[index].path, videos, chosen, clip_rate(experiment))
        took = time.perf_counter() - began
        print(f"{len(todo)} sets of {number} views in {took:.1f} s, compilation included, in {out}")
    if len(todo) < len(sets):
        print(f"{len(sets) - len(todo)} sets existed already in {out}")
    return [one.path for one in sets]


def sample_view_arrays(
    loaded: LoadedRun,
    prompts: Sequence[str],
    *,
    cameras: Sequence[str],
    views: int | None = None,
    distance: float = 0.5,
    shared_world_frame: bool = False,
    count: int = 1,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    batch: int | None = None,
    given: GivenFiles = NOTHING,
) -> tuple[np.ndarray, Cameras]:
    """Generate `count` sets of views per prompt.

    Arguments are those of `sample_views`; the same seed gives the same views.

    Returns:
      uint8 `P C V F H W 3` for P prompts and C sets of each, and the cameras `V F ...` of every set.

    Raises:
      ValueError: a request or cameras that the run cannot serve.
      NotFinite: views that hold NaN or infinity.
    """
    check_views(loaded.experiment)
    request = sample_request(loaded.experiment, frames, size, steps, guidance, given=given)
    chosen = read_views(cameras, views, request, distance=distance, shared_world_frame=shared_world_frame)
    _check_given(given, chosen.intrinsics.shape[0])
    batch = fitting_batch(batch, chosen.intrinsics.shape[0], loaded.devices)
    wanted = [(prompt, slot_of(prompt, index)) for prompt in range(len(prompts)) for index in range(count)]
    sets = [videos for _, videos in _generate(loaded, prompts, wanted, chosen, request, seed, batch, given)]
    return rearrange(np.stack(sets), "(p c) v f h w x -> p c v f h w x", c=count), chosen


def _check_given(given: GivenFiles, views: int) -> None:
    given.check_count(views, "views")
    if given.video is not None:
        raise ValueError("--video: not valid with --cameras; views are made from text or from --image.")


def check_views(experiment: Experiment) -> None:
    """Raise `ValueError` if the run's task generates single clips."""
    if not experiment.task.supports_views:
        raise ValueError("--cameras: this run generates single clips; it needs a run of jvgen.tasks.multiview.")


def read_views(
    cameras: Sequence[str], views: int | None, request: SampleRequest, *, distance: float, shared_world_frame: bool
) -> Cameras:
    """The cameras of every view, `V F 4` and `V F 3 4`, float64, from a path's name or from files.

    Raises:
      ValueError: no cameras, more than 64 views, as many files as views are not, names and files mixed, files with too
        few cameras or of different lengths.
    """
    if not cameras:
        raise ValueError(f"--cameras: name a path ({', '.join(paths.PATHS)}) or camera files.")
    if max(views or 0, len(cameras)) > MAX_VIEWS:
        raise ValueError(f"--views {max(views or 0, len(cameras))}: must be at most {MAX_VIEWS}.")
    aspect = request.width / request.height
    if len(cameras) == 1 and not as_path(cameras[0]).is_file() and "." not in cameras[0]:
        count = 2 if views is None else views
        return Cameras(
            paths.default_intrinsics(count, request.frames, aspect),
            paths.named_paths(cameras[0], count, request.frames, distance),
        )
    if views is not None and views != len(cameras):
        raise ValueError(
            f"--views {views}, but {len(cameras)} camera files: give one for each view, or the name of a path "
            f"({', '.join(paths.PATHS)})."
        )
    tracks = [read_cameras(path) for path in cameras]
    if len({len(track) for track in tracks}) > 1:
        lengths = ", ".join(f"{path}: {len(track)}" for path, track in zip(cameras, tracks, strict=True))
        raise ValueError(
            f"camera files of different lengths ({lengths}): frame k of a view belongs to frame k of the others; "
            "cut them to one length."
        )
    tracks = [track.subsample(request.frames, path) for track, path in zip(tracks, cameras, strict=True)]
    extrinsics = np.stack([track.extrinsics for track in tracks])
    start = extrinsics[:1, :1] if shared_world_frame else extrinsics[:, :1]
    size = (request.height, request.width)
    # Pixels are square: fy over fx tells the shape of the pictures that a file's numbers are divided by.
    fitted = [
        resized_and_cropped(
            track.intrinsics, (1000, round(1000 * track.intrinsics[0, 1] / track.intrinsics[0, 0])), size
        )
        for track in tracks
    ]
    moved = relative(extrinsics, start)
    # Files have a few decimals: what they are off by must not look like a baseline.
    moved[..., 3] = np.where(share_a_center(extrinsics, start)[..., None], 0.0, moved[..., 3])
    return Cameras(np.stack(fitted), moved)


def pairs_without_baseline(cameras: Cameras) -> list[tuple[int, int]]:
    """Pairs of views `V F ...` whose camera centers coincide in every frame, so that epipolar lines are undefined."""
    views = cameras.extrinsics.shape[0]
    return [
        (one, other)
        for one in range(views)
        for other in range(one + 1, views)
        if share_a_center(cameras.extrinsics[one], cameras.extrinsics[other]).all()
    ]


def fitting_batch(batch: int | None, views: int, devices: int) -> int:
    """Sets per batch, such that their clips divide over the devices.

    Raises:
      ValueError: a batch that does not divide; the message names those that do.
    """
    least = devices // np.gcd(views, devices)
    if batch is None:
        return int(least)
    if batch < 1 or batch % least:
        raise ValueError(
            f"--batch-size {batch} with {views} views: {batch * views} clips do not divide over {devices} devices; "
            f"take --batch-size {least} or a multiple of it."
        )
    return batch


def _generate(
    loaded: LoadedRun,
    prompts: Sequence[str],
    wanted: Sequence[tuple[int, int]],
    cameras: Cameras,
    request: SampleRequest,
    seed: int,
    batch: int,
    given: GivenFiles,
) -> Iterator[tuple[int, np.ndarray]]:
    key, views = jax.random.key(seed), cameras.intrinsics.shape[0]
    pixels = given.read(request.frames, (request.height, request.width), range(views))
    if pixels is not None:
        # The same images for every set.
        pixels = GivenPixels(np.broadcast_to(pixels.frames, (len(wanted), *pixels.frames.shape)))
    repeated = Cameras(*(jnp.asarray(np.broadcast_to(part, (batch, *part.shape)), jnp.float32) for part in cameras))
    return generate_in_batches(
        loaded,
        lambda task, parameters, frozen, tokens, slots, given=None: task.generate_views(
            parameters, frozen, tokens, repeated, slots, key, request, given
        ),
        prompts, wanted, batch, conditions=pixels,
    )  # fmt: skip


def write_views(folder: Path, videos: np.ndarray, cameras: Cameras, frames_per_second: float) -> None:
    """Write views, uint8 `V F H W 3`, with their cameras, a grid and a check sheet; the grid comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    times = np.arange(videos.shape[1]) * round(1e6 / frames_per_second)
    for view, video in enumerate(videos):
        write_clip(folder / f"view_{view}.mp4", video, frames_per_second)
        track = CameraTrack(f"view {view}", times, *(np.asarray(part[view], np.float64) for part in cameras))
        write_cameras(folder / f"view_{view}.txt", track)
    write_bytes(folder / "epipolar.png", png_bytes(epipolar_sheet(videos, cameras)))
    columns = int(np.ceil(np.sqrt(len(videos))))
    filled = np.zeros((-(-len(videos) // columns) * columns, *videos.shape[1:]), np.uint8)
    filled[: len(videos)] = videos
    write_clip(folder / "grid.mp4", rearrange(filled, "(r c) f h w x -> f (r h) (c w) x", c=columns), frames_per_second)
