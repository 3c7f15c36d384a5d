"""Record episodes of an environment as a data set that world models train on: `jvgen data build environment`."""

import dataclasses
import functools
from typing import Any, Literal

import numpy as np

from jvgen.config import Config, ConfigError
from jvgen.control.environments import open_environment
from jvgen.data.builders.build_loop import BuildJob, Execution, Progress, Summary, build_dataset
from jvgen.data.store.records import Record
from jvgen.data.video_files import encode_video
from jvgen.storage import Path
from jvgen.value_rules import Fraction, Frames, Pixels, Quality, Weight

FRAMES_PER_SECOND = 8.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordingConfig(Config):
    """What is recorded.

    Attributes:
      policy: "expert": the environment's own `expert_action()`; "random": uniform actions.
      noise: standard deviation of the noise on the expert's actions, in units of half their range: without any, a world
        model never sees what wrong actions do.
      random_share: share of the expert's actions that uniform ones replace. What the expert does tells what it sees, so
        a model of its recordings can take the action for the state; what a random action does is its own effect.
      steps: actions per episode; the environment's own length if None.
      size: side of Meta-World's frames.
      quality: constant rate factor (CRF) of the clips.
    """

    policy: Literal["expert", "random"] = "expert"
    noise: Weight = 0.3
    random_share: Fraction = 0.0
    steps: Frames | None = None
    size: Pixels | None = None
    quality: Quality = 12


def record_environment(
    name: str,
    out: str | Path,
    config: RecordingConfig | None = None,
    *,
    train: int = 20,
    validation: int = 4,
    seed: int = 0,
    workers: int = 1,
    overwrite: bool = False,
    progress: Progress | None = None,
    execution: Execution | None = None,
) -> Summary:
    """Record episodes; episode i is a function of (seed, i) alone.

    Args:
      name: of the environment, as `jvgen.control.environments.open_environment` takes it.
      out: folder of the data set.
      config: policy and length.
      train, validation: episodes of each split.
      seed: of all episodes.
      workers: processes, each with an environment of its own.
      overwrite, progress, execution: as in `jvgen.data.builders.build_loop.build_dataset`.

    Raises:
      ConfigError: no such environment, or one without an expert.
      ValueError: no episodes, or `out` exists and may not be replaced.
    """
    config = config or RecordingConfig()
    config.validate()
    if train < 1 or validation < 0:
        raise ValueError(f"train = {train}, validation = {validation}: at least 1 and 0 episodes.")
    environment = _opened(name, config.steps, config.size)
    if config.policy == "expert" and not hasattr(environment, "expert_action"):
        raise ConfigError(f"--env {name}: has no expert_action(); record random actions (policy = random).")
    splits = ["train"] * train + ["validation"] * validation
    jobs = [BuildJob(split, episode_id(seed, index), index) for index, split in enumerate(splits)]
    execution = execution or Execution()
    if workers == 1:
        # A limit needs a thread, and what draws pictures belongs to the thread that opened the environment.
        execution = dataclasses.replace(execution, limit=None)
    return build_dataset(
        out,
        jobs,
        functools.partial(record_episode, name, config, seed),
        description=f"Episodes of {name}, recorded by jvgen.",
        metadata={"origin": "environment", "options": {"name": name, "seed": seed, **dataclasses.asdict(config)}},
        workers=workers,
        processes=workers > 1,
        overwrite=overwrite,
        progress=progress,
        execution=execution,
    )


def record_episode(name: str, config: RecordingConfig, seed: int, index: int) -> Record:
    """Episode `index`: frames, the action taken at each and its reward (zero at the last frame)."""
    environment = _opened(name, config.steps, config.size)
    rng = np.random.default_rng((seed, index))
    space = environment.action_space
    half = (space.high - space.low) / 2
    frame, _ = environment.reset(seed=int(rng.integers(2**31)))
    frames, actions, rewards, ended = [frame], [], [], False
    while not ended:
        if config.policy == "random" or (config.random_share and rng.uniform() < config.random_share):
            action = rng.uniform(space.low, space.high)
        else:
            action = environment.expert_action() + config.noise * half * rng.normal(size=space.shape)
        action = np.clip(action, space.low, space.high).astype(np.float32)
        frame, reward, terminated, truncated, _ = environment.step(action)
        frames.append(frame)
        actions.append(action)
        rewards.append(reward)
        ended = terminated or truncated or len(actions) == config.steps
    video = np.stack(frames)
    return Record(
        id=episode_id(seed, index),
        kind="dynamic",
        clips=(encode_video(video, FRAMES_PER_SECOND, quality=config.quality, full_color=True),),
        frames_per_second=FRAMES_PER_SECOND,
        frames=len(video),
        height=video.shape[1],
        width=video.shape[2],
        actions=np.stack([*actions, np.zeros_like(actions[0])]),
        rewards=np.asarray([*rewards, 0.0], np.float32),
    )


def episode_id(seed: int, index: int) -> str:
    """Id of the record of an episode."""
    return f"episode-{seed}-{index:06d}"


@functools.lru_cache(maxsize=1)
def _opened(name: str, steps: int | None, size: int | None) -> Any:
    """The environment of this process: opening one takes seconds."""
    return open_environment(name, split="train", steps=steps, size=size)
