"""What a world model was trained on, against the environment that it is to act in: camera, look, scale of actions."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jvgen.control.scene_environment import scenes_of
from jvgen.data.scenes.scenes import SceneConfig
from jvgen.data.store.sources import open_source, read_metadata
from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.data.stream.frame_times import SLOWEST

RECORDINGS_READ = 8
DEFAULT_CAMERA = "corner"  # of `metaworld:TASK`


def unlike(data: DataConfig, environment: Any) -> str | None:
    """Why the recordings of a run's data config are not of this environment; None if nothing says so."""
    steps = {step for bucket in data.buckets for source in data.sources for step in frames_per_step(bucket, source)}
    if steps and 1 not in steps:
        return (
            f"trained with {' or '.join(f'{step:.3g}' for step in sorted(steps))} recorded frames a step (strides or "
            "frames_per_second of data.buckets), so its actions are sums of so many; the environment takes one at a "
            "time. Train with strides of 1, or wrap the environment so that it repeats an action as often."
        )
    faults = [_fault(source, environment) for source in data.sources]
    return faults[0] if all(faults) else None


def frames_per_step(bucket: BucketConfig, source: SourceConfig) -> set[float]:
    """Recorded frames from one frame of a clip to the next; empty where the recordings' rate is needed and not known.

    Recordings up to 2% slower than `frames_per_second` are at that rate, as everywhere.
    """
    if bucket.frames_per_second is None:
        return {float(stride * source.frame_stride) for stride in bucket.strides}
    try:
        rates = np.unique(open_source(source.path, source.split).index.frames_per_second)
    except (OSError, ValueError):
        return set()
    ratios = rates[rates > 0].astype(np.float64) / bucket.frames_per_second
    return {1.0 if SLOWEST <= ratio <= 1 / SLOWEST else float(ratio) for ratio in ratios}


def _fault(source: SourceConfig, environment: Any) -> str | None:
    """Why recordings of a source are not of this environment; None if nothing says so."""
    try:
        metadata = read_metadata(source.path)
        recorded = open_source(source.path, source.split)
    except (OSError, ValueError):
        return None
    options, origin = metadata.get("options", {}), metadata.get("origin")
    if origin == "scenes" and isinstance(getattr(environment, "scenes", None), SceneConfig):
        return _other_look(source.path, scenes_of(metadata)[0], environment.scenes)
    camera = getattr(environment, "camera", None)
    if origin == "environment" and camera is not None:
        other = _camera(options)
        if other != camera:
            return (
                f"trained on {source.path}, recorded by camera {other!r}; the environment has {camera!r}. Give --env "
                f"the camera that the model knows, {options['name']}, or train on recordings of the other one."
            )
    return _other_scale(source.path, options.get("clip_actions"), recorded, environment.action_space)


def _other_look(path: str, known: SceneConfig, scenes: SceneConfig) -> str | None:
    unknown = {
        "colors": not set(scenes.colors) <= set(known.colors),
        "shapes": not set(scenes.shapes) <= set(known.shapes),
        "background": scenes.background != known.background,
        "objects": scenes.objects[0] < known.objects[0] or scenes.objects[1] > known.objects[1],
        # How far cameras are from the middle one.
        "wander": scenes.wander > known.wander,
    }
    for field, differs in unknown.items():
        if differs:
            return (
                f"trained on {path}, scenes with {field} = {getattr(known, field)}; the environment's have "
                f"{getattr(scenes, field)}, which the model has not seen. Build the environment's data set with the "
                "same options, or train on scenes like these."
            )
    return None


def _camera(options: Mapping[str, Any]) -> str:
    parts = str(options.get("name", "")).split(":")
    return parts[2] if len(parts) > 2 and parts[2] else DEFAULT_CAMERA


def _other_scale(path: str, clipped: Any, recorded: Any, space: Any) -> str | None:
    if np.ndim(getattr(space, "low", None)) == 0 or np.ndim(getattr(space, "high", None)) == 0:
        return None  # no box of one dimension: planning refuses it
    if clipped is not None and (
        np.any(np.float32(clipped[0]) != space.low) or np.any(np.float32(clipped[1]) != space.high)
    ):
        return (
            f"trained on {path}, whose actions were clipped to {clipped[0]:g} to {clipped[1]:g}; the environment's are "
            f"from {space.low.min():g} to {space.high.max():g}: another scale. Build the data set with the "
            "environment's bounds (--clip-actions), or wrap the environment so that it takes the recorded ones."
        )
    actions = [recorded.read(index).actions for index in range(min(RECORDINGS_READ, len(recorded)))]
    largest = max((float(np.abs(one).max()) for one in actions if one.size), default=0.0)
    bound = float(np.maximum(np.abs(space.low), np.abs(space.high)).max())
    # A recording may hold actions just outside of the bounds, which simulators clip.
    if largest > 1.05 * bound:
        return (
            f"trained on {path}, whose actions reach {largest:g}; the environment's are bounded by {bound:g}: another "
            "scale. Build the data set with --clip-actions, or wrap the environment so that it takes the recorded ones."
        )
    return None
