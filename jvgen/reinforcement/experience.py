"""Where a run's batches come from: the agent acts, the world model imagines, both are remembered, batches are drawn.

It has the interface of `jvgen.data.stream.loader.Loader` and of `jvgen.training.evaluation.Evaluator`, so the training
loop is that of every task. What is drawn in a step is a function of the seed, the step, the training state and what was
remembered before; a checkpoint holds how many rows the replays have, and the actions of the episode under way, which
are taken again in the environment when the run resumes.
"""

import contextlib
import functools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from jvgen.config import ConfigError
from jvgen.control.collection import (
    CollectedEpisode,
    Collector,
    EnvironmentSpec,
    SteppedEnvironment,
    describe_environment,
)
from jvgen.control.environments import open_environment
from jvgen.control.imagination import Imagination, check_finite
from jvgen.control.replay import ReplayRing, RowSpec, Transitions
from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.data.stream.loader import LoadedBatch
from jvgen.reinforcement.config import ReinforcementConfig
from jvgen.reinforcement.task import ACTIONS, REWARDS, SHORT_VIDEO, TRANSITIONS, VIDEO, ReinforcementTask
from jvgen.storage import is_remote
from jvgen.tasks.task import ExperienceContext

FOLDER = "replay"
# Purposes of random numbers: of numpy (seed, purpose, number), and of keys fold_in(fold_in(seed, purpose), step).
_EPISODE, _DEMONSTRATION, _RANDOM, _EVALUATION, _REAL, _IMAGINED, _CLIPS, _STARTS, _ACT, _IMAGINE = range(10)
SHOWN_SEQUENCES = 4


class Experience:
    """The experience of one run.

    Args:
      task: whose batches are made, and whose policy acts.
      context: of the run.

    Raises:
      ConfigError: more than one environment or one bucket; a run directory in a bucket, where replays cannot be.
    """

    # Of evaluations, for `checkpoint.best_metric`.
    metrics = ("return", "success", "environment_steps")

    def __init__(self, task: ReinforcementTask, context: ExperienceContext):
        self.task, self.config, self.context = task, task.config, context
        config, data, self.world = task.config, context.data, task.config.imagination
        check_data(data)
        if is_remote(context.folder):
            raise ConfigError(f"run directory {context.folder}: a replay is mapped into memory; use a local disk.")
        self.bucket_config = data.buckets[0]
        self.spec = described(config, data.sources[0])
        spec = RowSpec((config.resolution, config.resolution, 3), config.action_width)
        options = {"capacity": config.replay_capacity, "reserve": config.replay_reserve}
        self.stack = config.agent.frame_stack
        self.real = ReplayRing(context.folder / FOLDER / "real", spec, **options)
        self._act = jax.jit(task.act)
        self.imagined = self._imagination = None
        if self.world is not None:
            folder = context.folder / FOLDER / "imagined"
            self.imagined = ReplayRing(folder, spec, history=self.stack - 1, **options)
            self._imagination = Imagination(
                self.world.world(),
                self._imagined_policy,
                steps=self.world.horizon,
                stack=self.stack,
                rows_at_once=self.world.rows_at_once,
                sharding=context.sharding,
                pixels_scaled_twice=self.world.released.pixels_scaled_twice,
            )
            self._prepare = jax.jit(self.world.world().prepare)
            trained = self.bucket_config.frames - self.world.tokenizer.context_frames
            if self.world.horizon > trained:
                context.log(
                    f"WARNING: task.imagination.horizon = {self.world.horizon}, but clips of "
                    f"{self.bucket_config.frames} frames (data.buckets) train the {trained} frames after their context "
                    "alone: later ones are imagined at positions that this run does not train. Published: clips of "
                    f"context and horizon together, here {self.world.horizon + self.world.tokenizer.context_frames}."
                )
        workers = {
            "stack": self.stack, "failure_budget": config.failure_budget, "timeout": config.timeout,
            # Environments of one's own are opened without it.
            "steps": config.episode_steps,
        }  # fmt: skip
        self._environment = SteppedEnvironment(environment_maker(config, data, "train"), **workers)
        held_out = environment_maker(config, data, "evaluation")
        self._evaluation = Collector(held_out, config.environments, **workers)
        self._workers = workers
        self._acting = False
        self._document: dict[str, Any] = {
            "step": 0, "manifest": data.sources[0].path, "plan": data.sources[0].split, "real": 0, "imagined": 0,
            "episode": 0, "actions": [], "frame": 0, "taken": 0,
        }  # fmt: skip
        self._state: Any = None

    # The interface of a loader.

    @property
    def buckets(self) -> tuple[BucketConfig, ...]:
        """The batch shape."""
        return (self.bucket_config,)

    def bucket(self, step: int) -> BucketConfig:
        """The shape of a step's batch."""
        return self.bucket_config

    def record_ids(self, step: int) -> tuple[str, ...]:
        """Names of the rows of a batch."""
        return tuple(f"step {step}, row {row}" for row in range(self.bucket_config.batch_size))

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint of `step` holds; all rows are written to disk first."""
        assert step == self._document["step"], f"the experience of step {self._document['step']}, not {step}"
        for ring in self._rings():
            ring.commit()
        return dict(self._document)

    def check_state(self, saved: dict[str, Any]) -> None:
        """Raise `ValueError` for a checkpoint of a run in another environment."""
        before, now = ((one["manifest"], one["plan"]) for one in (saved, self._document))
        if before != now:
            raise ValueError(
                f"data.sources: the checkpoint's run acted in {' '.join(before)}, this one acts in {' '.join(now)}; "
                "use another run directory."
            )

    def resume(self, saved: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        if saved:
            self._document = dict(saved)
            for ring, name in zip(self._rings(), ("real", "imagined"), strict=False):
                ring.rewind(saved[name])

    def observe(self, state: Any) -> None:
        """Take the training state that the next batch depends on."""
        self._state = state

    def batches(self, start_step: int, stop_step: int | None = None) -> "_Batches":
        """Batches from a step on."""
        return _Batches(self, start_step, stop_step)

    def close(self) -> None:
        """End the environments' processes."""
        self._environment.close()
        self._evaluation.close()

    def batch(self, step: int) -> LoadedBatch:
        """Act, imagine if it is due, and draw the batch of a step from what `observe` was given."""
        facts: dict[str, float] = {}
        if step == 0:
            self._first_experience()
        taken = step - self.config.fit_steps
        if taken >= 0:
            if self.world is not None and taken % self.world.rollouts_every == 0:
                facts |= self._imagine(step, first=taken == 0)
            facts |= self._step(step)
        facts |= {
            "environment_steps": self.environment_steps,
            "environment_failures": self._environment.failures + self._evaluation.failures,
        }
        arrays = self._draw(step)
        document = {"step": step + 1, "real": self.real.rows_added}
        if self.imagined is not None:
            document["imagined"] = self.imagined.rows_added
        self._document |= document
        slots = np.arange(self.bucket_config.batch_size)
        return LoadedBatch(step, self.bucket_config, arrays, self.record_ids(step), 0.0, slots=slots, facts=facts)

    # Acting.

    @property
    def environment_steps(self) -> int:
        """Simulator steps so far, those of random actions included and those of demonstrations not."""
        return self._document["taken"] * self.spec.action_repeat

    def _rings(self) -> list[ReplayRing]:
        return [ring for ring in (self.real, self.imagined) if ring is not None]

    def _key(self, purpose: int, step: int) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(self.context.seed), purpose), step)

    def _rng(self, purpose: int, number: int) -> np.random.Generator:
        return np.random.default_rng((self.context.seed, purpose, number))

    def _seeds(self, purpose: int, count: int, first: int = 0) -> list[int]:
        """Seeds of the resets of episodes, by their numbers."""
        return [int(self._rng(purpose, first + number).integers(2**31)) for number in range(count)]

    def _first_experience(self) -> None:
        """Demonstrations, and episodes of random actions."""
        config, log = self.config, self.context.log
        for ring in self._rings():
            ring.rewind(0)
        make, taken, episodes = environment_maker(config, self.context.data, "train"), 0, 0
        with Collector(make, config.environments, **self._workers) as collector:
            if config.demonstrations:
                made = collector.collect(None, self._seeds(_DEMONSTRATION, config.demonstrations))
                self._remember(made)
                log(f"{len(made)} demonstrations, {sum(episode.success for episode in made)} of them successful")
            while taken < config.agent.random_steps:
                self.context.check()

                def random(frames: np.ndarray, number: int, first: int = episodes) -> np.ndarray:
                    rng = np.random.default_rng((self.context.seed, _RANDOM, first, number))
                    return rng.uniform(-1.0, 1.0, (len(frames), config.action_width))

                made = collector.collect(random, self._seeds(_RANDOM, config.environments, episodes))
                self._remember(made)
                taken += sum(len(episode.actions) for episode in made)
                episodes += len(made)
        self._document["taken"] = taken
        log(f"{taken} steps of random actions in {episodes} episodes")

    def _remember(self, episodes: Sequence[CollectedEpisode]) -> None:
        for episode in episodes:
            self.real.begin(episode.frames[0])
            for row in zip(episode.frames[1:], episode.actions, episode.rewards, episode.discounts, strict=True):
                self.real.add(*row)

    def _step(self, step: int) -> dict[str, float]:
        """One action in the environment; numbers of the episode if it ends."""
        document, environment = self._document, self._environment
        if not self._acting:
            (seed,) = self._seeds(_EPISODE, 1, document["episode"])
            environment.begin(seed, [np.asarray(action, np.float32) for action in document["actions"]])
            self._acting = True
            if document["actions"] and _digest(environment.last_frame) != document["frame"]:
                self.context.log(
                    "WARNING: the environment is not the same after the same actions: the episode under way goes on "
                    "from another state than before the run was interrupted."
                )
        keys = self._key(_ACT, step)[None]
        noise = self.task.noise(jnp.int32(step))
        actions = self._act(self._policy_parameters(), environment.observation[None], keys, noise, jnp.bool_(False))
        episode = environment.step(np.asarray(actions)[0])
        self._document = document | {"taken": document["taken"] + 1}
        if episode is None:
            actions = [action.tolist() for action in environment.actions]
            self._document |= {"actions": actions, "frame": _digest(environment.last_frame)}
            return {}
        self._remember([episode])
        self._document |= {"episode": document["episode"] + 1, "actions": [], "frame": 0}
        self._acting = False
        return {
            "episode_return": float(episode.rewards.sum()),
            "episode_success": float(episode.success),
            "episode_steps": len(episode.actions),
        }

    def _policy_parameters(self) -> dict[str, Any]:
        return {name: self._state.parameters[name] for name in ("encoder", "actor")}

    # Imagining.

    def _imagined_policy(self, parameters: Any, frames: jax.Array, keys: jax.Array) -> jax.Array:
        policy, noise, uniform = parameters
        return self.task.act(policy, frames, keys, noise, uniform)

    def _rollouts(self, step: int, count: int, uniform: bool, key: jax.Array) -> Any:
        parameters, imagination = self._state.parameters, self._imagination
        starts = self.real.draw_stacks(count, self._rng(_STARTS, step), imagination.start_frames)
        weights = self._prepare(parameters["tokenizer"], parameters["transformer"])
        policy = (self._policy_parameters(), self.task.noise(jnp.int32(step)), jnp.bool_(uniform))
        imagined = jax.device_get(imagination(weights, policy, starts, key))
        check_finite(imagined)
        return imagined

    def _imagine(self, step: int, first: bool) -> dict[str, float]:
        count = self.world.first_rollouts if first else self.world.rollouts
        imagined = self._rollouts(step, count, first, self._key(_IMAGINE, step))
        now = self._imagination.start_frames - 1
        for frames, actions, rewards in zip(imagined.frames, imagined.actions, imagined.rewards, strict=True):
            self.imagined.begin(frames[now], history=frames[now - self.stack + 1 : now])
            for row in zip(frames[now + 1 :], actions, rewards, strict=True):
                self.imagined.add(*row)
        return {"imagined_reward": float(imagined.rewards.mean())}

    # Batches.

    def _draw(self, step: int) -> dict[str, np.ndarray]:
        taken, fields = step - self.config.fit_steps, self.task.fields(self.bucket_config)
        rows = self.bucket_config.batch_size
        arrays = {name: np.zeros((rows, *spec.shape), spec.dtype) for name, spec in self._blank(taken, fields).items()}
        if taken >= 0:
            arrays |= self._transitions(step)
        if self.world is not None and self._trains_world(taken):
            arrays |= self._clips(step)
        return arrays

    def _blank(self, taken: int, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that nothing reads in a step."""
        clips = self.world is not None and self._trains_world(taken)
        return {
            name: spec for name, spec in fields.items() if (taken < 0 if name.startswith(TRANSITIONS) else not clips)
        }

    def _trains_world(self, taken: int) -> bool:
        """Whether the world model is updated in a step, given the agent's steps before it."""
        return taken < 0 or taken % self.world.transformer_every == 0 or taken % self.world.tokenizer_every == 0

    def _transitions(self, step: int) -> dict[str, np.ndarray]:
        """Real and imagined ones in the ratio of the configuration, for each update of the agent."""
        config = self.config.agent
        real = config.batch_size
        if self.world is not None:
            real = round(self.world.real_ratio * config.batch_size)
        parts = []
        for ring, purpose, count in ((self.real, _REAL, real), (self.imagined, _IMAGINED, config.batch_size - real)):
            if count:
                drawn = ring.draw(
                    count * config.updates_per_step, self._rng(purpose, step), steps=config.steps,
                    discount=config.discount, stack=self.stack,
                )  # fmt: skip
                parts.append([rearrange(a, "(u n) ... -> u n ...", u=config.updates_per_step) for a in drawn])
        together = (np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))
        rows = self.bucket_config.batch_size
        return {
            f"{TRANSITIONS}{name}": rearrange(array, "u (r n) ... -> r u n ...", r=rows)
            for name, array in zip(Transitions._fields, together, strict=True)
        }

    def _clips(self, step: int) -> dict[str, np.ndarray]:
        bucket, rng = self.bucket_config, self._rng(_CLIPS, step)
        segments = self.real.draw_segments(bucket.batch_size, rng, bucket.frames)
        context, future = self.world.tokenizer.context_frames, self.task.short_future(bucket)
        later = np.stack([rng.permutation(bucket.frames - context)[:future] for _ in range(bucket.batch_size)])
        chosen = np.concatenate(
            [np.tile(np.arange(context), (len(later), 1)), context + np.sort(later, axis=1)], axis=1
        )
        short = np.take_along_axis(segments.frames, chosen[:, :, None, None, None], axis=1)
        return {VIDEO: segments.frames, ACTIONS: segments.actions, REWARDS: segments.rewards, SHORT_VIDEO: short}

    # The interface of an evaluator.

    def evaluate(
        self,
        state: Any,
        count: int,
        *,
        stop: Callable[[], bool] = lambda: False,
        watching: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ) -> dict[str, float] | None:
        """Mean return and success rate of episodes without exploration; None if `stop` says so in between.

        An episode is a success if any of its steps is.
        """
        self.observe(state)
        seeds, size = self._seeds(_EVALUATION, self.config.evaluation_episodes), self.config.environments
        episodes: list[CollectedEpisode] = []
        for first in range(0, len(seeds), size):
            if stop():
                return None
            some = seeds[first : first + size]
            with watching(f"episodes {first + 1} to {first + len(some)} of the evaluation"):
                episodes += self._evaluation.collect(self._best_actions, some)
        return {
            "return": float(np.mean([episode.rewards.sum() for episode in episodes])),
            "success": float(np.mean([episode.success for episode in episodes])),
            "environment_steps": self.environment_steps,
        }

    def visualize(self, state: Any) -> dict[str, np.ndarray]:
        """An episode of the evaluation, and imagined sequences after the recorded frames that they start from."""
        self.observe(state)
        (episode,) = self._evaluation.collect(self._best_actions, self._seeds(_EVALUATION, 1))
        shown = {"episode": episode.frames[None]}
        if self.world is not None and len(self.real) > self._imagination.start_frames:
            step = int(state.step)
            shown["imagined"] = self._rollouts(step, SHOWN_SEQUENCES, False, self._key(_IMAGINE, step)).frames
        return shown

    def _best_actions(self, frames: np.ndarray, number: int) -> np.ndarray:
        # As many rows as there are environments, so that one program does for all.
        padded = np.concatenate([frames, np.repeat(frames[-1:], self.config.environments - len(frames), axis=0)])
        keys = jnp.repeat(self._key(_ACT, 0)[None], len(padded), axis=0)
        actions = self._act(self._policy_parameters(), padded, keys, jnp.float32(0), jnp.bool_(False))
        return np.asarray(actions)[: len(frames)]


class _Batches(Iterator[LoadedBatch]):
    """Batches of an experience, in order."""

    def __init__(self, experience: Experience, start: int, stop: int | None):
        self._experience, self._step, self._stop = experience, start, stop

    def __next__(self) -> LoadedBatch:
        if self._step == self._stop:
            raise StopIteration
        batch = self._experience.batch(self._step)
        self._step += 1
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: Any) -> None:
        pass


def environment_maker(config: ReinforcementConfig, data: DataConfig, use: str) -> Callable[[], Any]:
    """Opens the environment of a run, in any process.

    Args:
      use: "train" or "evaluation", which have splits of their own.
    """
    source = data.evaluation_sources[0] if use == "evaluation" and data.evaluation_sources else data.sources[0]
    return _maker(source.path, source.split, config.episode_steps, config.resolution)


def described(config: ReinforcementConfig, source: SourceConfig) -> EnvironmentSpec:
    """What the environment shows and takes; it is started for this once."""
    return _describe(source.path, source.split, config.episode_steps, config.resolution, config.timeout)


@functools.lru_cache(maxsize=4)
def _describe(path: str, split: str, steps: int | None, size: int, timeout: float) -> EnvironmentSpec:
    try:
        return describe_environment(_maker(path, split, steps, size), timeout)
    except ValueError as error:
        raise ConfigError(f"environment {path}: {error}") from error


def _maker(path: str, split: str, steps: int | None, size: int) -> Callable[[], Any]:
    return functools.partial(open_environment, path, split=split, steps=steps, size=size)


def check_data(data: DataConfig) -> None:
    """Raise `ConfigError` unless data names one environment, one other for evaluation at most, and one bucket."""
    if len(data.sources) != 1 or len(data.evaluation_sources) > 1 or len(data.buckets) != 1:
        raise ConfigError(
            f"data: {len(data.sources)} sources, {len(data.evaluation_sources)} evaluation_sources and "
            f"{len(data.buckets)} buckets; an agent acts in one environment, is evaluated in one, and has one batch "
            "shape."
        )


def _digest(frame: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(frame).tobytes())
