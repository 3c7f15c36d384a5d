"""What a run of reinforcement learning is: the agent, the world model it is trained in, the schedule of both."""

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Annotated

from jvgen.config import Config, ConfigError
from jvgen.control.collection import EnvironmentSpec
from jvgen.control.drq_v2 import DrQV2Config
from jvgen.control.imagination import check_world
from jvgen.data.stream.config import BucketConfig, DataConfig
from jvgen.losses.perceptual import PerceptualConfig
from jvgen.models.ivideogpt.config import CompressiveTokenizerConfig, FrameTransformerConfig
from jvgen.models.ivideogpt.sampling import SamplingConfig
from jvgen.models.ivideogpt.world import World
from jvgen.tasks.perceptual import check_weights
from jvgen.tasks.task import TaskConfig
from jvgen.tasks.video_tokenizer import RestartConfig
from jvgen.value_rules import (
    Bounds,
    Count,
    CountOrZero,
    Fraction,
    Frames,
    Pixels,
    Positive,
    Step,
    Steps,
    Weight,
    Workers,
)

if TYPE_CHECKING:
    from jvgen.reinforcement.task import ReinforcementTask


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReleasedFaults(Config):
    """What the released code of iVideoGPT does and the paper does not describe, to measure what it costs.

    Attributes:
      pixels_scaled_twice: in imagination the policy is given pixels in [0, 1], which its encoder divides by 255 again.
      reward_one_step_late: the world model learns, at each frame, the reward of the action after it; the prediction is
        still taken for that of the action before it.
      dropout_in_rollouts: attention dropout stays on in imagination.
    """

    pixels_scaled_twice: bool = False
    reward_one_step_late: bool = False
    dropout_in_rollouts: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImaginationConfig(Config):
    """The world model of a run (arXiv 2405.15223, section 4.3 and appendix): how it learns, what is imagined in it.

    Defaults are the published schedule; all intervals are in steps of the agent, two simulator steps each there.

    Attributes:
      tokenizer, transformer: the networks; the transformer has actions and rewards.
      pretrained: run directory of a world model (`jvgen.tasks.world_model`), or a folder with exported `tokenizer/` and
        `transformer/`, to start from; none starts from random weights. Action and reward heads that it lacks are new.
      accept_other_data: start from it even though its recordings were of another camera or environment, or its contexts
        began with a goal image.
      perceptual, perceptual_weight: distance in the tokenizer's loss.
      moving_weight: of moving pixels in the tokenizer's loss, as `VideoTokenizerConfig.moving_weight`; 0 as published.
      restart: of the tokenizer's dead codes, its steps being updates of the tokenizer; the published code never does.
      reward_weight: of the squared error of rewards (in symlog).
      fit_steps: training steps before the agent acts: each updates tokenizer and transformer once.
      transformer_every, tokenizer_every: one update in this many steps of the agent.
      tokenizer_frames: future frames of a clip in a tokenizer update, at most.
      horizon: steps of an imagined sequence.
      first_rollouts: sequences at the start, with random actions.
      rollouts, rollouts_every: sequences, and the steps of the agent after which they are imagined again.
      real_ratio: share of the agent's batch that comes from the environment.
      rows_at_once: sequences imagined at a time (memory); none for all.
      sampling: how ids are chosen in imagination.
      released: faults of the released code to reproduce.
    """

    tokenizer: CompressiveTokenizerConfig = CompressiveTokenizerConfig()
    transformer: FrameTransformerConfig = FrameTransformerConfig(action_width=4, reward=True)
    pretrained: str | None = None
    accept_other_data: bool = False
    perceptual: PerceptualConfig = PerceptualConfig()
    perceptual_weight: Weight = 1.0
    moving_weight: Weight = 0.0
    restart: RestartConfig = RestartConfig()
    reward_weight: Weight = 1.0
    fit_steps: Step = 1000
    transformer_every: Steps = 5
    tokenizer_every: Steps = 20
    tokenizer_frames: Frames = 5
    horizon: Annotated[int, Bounds(at_least=1, at_most=1000)] = 10
    first_rollouts: Count = 640
    rollouts: Count = 32
    rollouts_every: Steps = 100
    real_ratio: Fraction = 0.5
    rows_at_once: Count | None = None
    sampling: SamplingConfig = SamplingConfig()
    released: ReleasedFaults = ReleasedFaults()

    def world(self) -> World:
        """The structure of the world in which sequences of `horizon` steps are imagined."""
        return World(
            self.tokenizer,
            self.transformer,
            self.tokenizer.context_frames + self.horizon,
            self.sampling,
            dropout=self.released.dropout_in_rollouts,
        )

    def validate(self) -> None:
        self.transformer.check_tokenizer(self.tokenizer, self.tokenizer.context_frames + self.horizon)
        check_world(self.world(), self.horizon)
        if self.released.dropout_in_rollouts and not self.transformer.attention_dropout:
            raise ValueError(
                "released.dropout_in_rollouts = true, but transformer.attention_dropout = 0: there is no dropout to "
                "leave on; train with some, or leave the flag off."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReinforcementConfig(TaskConfig):
    """DrQ-v2 in an environment of frames, alone or also in what a world model imagines (MBPO).

    `data.sources` names the environment, as `jvgen.control.environments.open_environment` takes it. The first
    `imagination.fit_steps` steps of training fit the world model; every later one is one action in the environment and
    `agent.updates_per_step` updates of the agent. `data.buckets` has one bucket: the clips that the world model is
    trained on (frames, batch size); the agent's batch is a multiple of its batch size.

    Attributes:
      agent: DrQ-v2.
      imagination: the world model; none for DrQ-v2 alone.
      resolution: height and width of frames.
      action_width: components of an action, each in [-1, 1].
      episode_steps: actions per episode, of every kind of environment; none for the environment's own number.
      demonstrations: episodes of the environment's expert that the replay starts with.
      replay_capacity: rows (frames) of the replay, and of that of imagined sequences.
      replay_reserve: rows that may be added since the last checkpoint but one, see `jvgen.control.replay`.
      evaluation_episodes: per evaluation, without exploration, always the same starts.
      environments: processes for demonstrations, first episodes and evaluation; training acts in one more.
      failure_budget: failures of environments in one start of the run (they die, hang, return NaN) before it ends.
      timeout: seconds that a step or a reset of an environment may take.
    """

    agent: DrQV2Config = DrQV2Config()
    imagination: ImaginationConfig | None = None
    resolution: Pixels = 64
    action_width: Count = 4
    episode_steps: Frames | None = None
    demonstrations: CountOrZero = 5
    replay_capacity: Annotated[int, Bounds(at_least=2, at_most=10**8)] = 1_000_000
    replay_reserve: Count = 50_000
    evaluation_episodes: Count = 20
    environments: Workers = 1
    failure_budget: CountOrZero = 10
    timeout: Positive = 120.0

    @property
    def collects_experience(self) -> bool:
        return True

    @property
    def fit_steps(self) -> int:
        """Training steps before the agent acts."""
        return 0 if self.imagination is None else self.imagination.fit_steps

    def build(self) -> "ReinforcementTask":
        from jvgen.reinforcement.task import ReinforcementTask

        return ReinforcementTask(self)

    def validate(self) -> None:
        steps = self.agent.steps
        if self.episode_steps is not None and self.episode_steps < steps:
            raise ValueError(
                f"episode_steps = {self.episode_steps}: no episode holds a transition of agent.steps = {steps}; make "
                "episodes longer, or transitions shorter."
            )
        if self.imagination is None:
            return
        world = self.imagination
        if world.horizon < steps:
            raise ValueError(
                f"imagination.horizon = {world.horizon}: no sequence holds a transition of agent.steps = {steps}; "
                "imagine longer ones, or make transitions shorter."
            )
        if (world.tokenizer.resolution, world.transformer.action_width) != (self.resolution, self.action_width):
            raise ValueError(
                f"imagination: frames of {world.tokenizer.resolution} pixels and actions of "
                f"{world.transformer.action_width} components, but resolution = {self.resolution} and action_width = "
                f"{self.action_width}; make them equal."
            )
        if world.tokenizer.channels != 3:
            raise ValueError(f"imagination.tokenizer.channels = {world.tokenizer.channels}: set it to 3 (RGB).")

    def check_bucket(self, bucket: BucketConfig) -> None:
        if (bucket.height, bucket.width) != (self.resolution, self.resolution):
            raise ValueError(
                f"clips of {bucket.height}x{bucket.width}: task.resolution = {self.resolution}; make them equal."
            )
        if bucket.views != 1 or bucket.segment is not None or bucket.strides != (1,):
            raise ValueError(
                "experience is single clips of consecutive frames: set views = 1, strides = (1,), no segment."
            )
        if self.agent.batch_size % bucket.batch_size:
            raise ValueError(
                f"task.agent.batch_size = {self.agent.batch_size} is not a multiple of batch_size = "
                f"{bucket.batch_size}, the clips per update of the world model, with which it is split over devices."
            )
        if self.imagination is not None:
            self.imagination.transformer.check_tokenizer(self.imagination.tokenizer, bucket.frames)
            if self.episode_steps is not None and bucket.frames > self.episode_steps + 1:
                raise ValueError(
                    f"clips of {bucket.frames} frames: episodes of task.episode_steps = {self.episode_steps} have "
                    f"{self.episode_steps + 1}; make clips shorter, or episodes longer."
                )

    def check_weights(self) -> None:
        if self.imagination is None:
            return
        check_weights(self.imagination.perceptual)
        if self.imagination.pretrained is not None:
            from jvgen.reinforcement.pretrained import read_pretrained

            read_pretrained(self.imagination, check_only=True)

    def check_data(self, data: DataConfig) -> None:
        """Start the environment once in a process of its own, and compare it with the configuration."""
        from jvgen.reinforcement.experience import check_data, described, environment_maker

        check_data(data)
        spec = described(self, data.sources[0])
        self.check_environment(data.sources[0].path, spec)
        if self.imagination is not None and self.imagination.pretrained is not None:
            from jvgen.reinforcement.pretrained import check_trained_on

            if not self.imagination.accept_other_data:
                with contextlib.closing(environment_maker(self, data, "train")()) as environment:
                    check_trained_on(self.imagination.pretrained, environment)

    def check_environment(self, name: str, spec: EnvironmentSpec) -> None:
        """Raise `ConfigError` for an environment in which this agent cannot act."""
        wanted = (self.resolution, self.resolution, 3)
        if spec.frame != wanted:
            raise ConfigError(
                f"environment {name}: its frames are {spec.frame}, not {wanted}; set task.resolution, or open it with "
                "another size."
            )
        if spec.low is None:
            raise ConfigError(
                f"environment {name}: its actions are {spec.actions}; an agent of continuous actions needs a Box of "
                "one dimension."
            )
        if len(spec.low) != self.action_width:
            raise ConfigError(
                f"environment {name}: its actions have {len(spec.low)} components, but task.action_width = "
                f"{self.action_width}; make them equal."
            )
        if set(spec.low) != {-1.0} or set(spec.high) != {1.0}:
            raise ConfigError(
                f"environment {name}: actions are between {list(spec.low)} and {list(spec.high)}; the agent's are in "
                "[-1, 1]. Wrap it: gymnasium.wrappers.RescaleAction(environment, -1, 1)."
            )
        if self.demonstrations and not spec.has_expert:
            raise ConfigError(
                f"environment {name}: has no expert_action(), so task.demonstrations = {self.demonstrations} cannot be "
                "made; set it to 0."
            )
