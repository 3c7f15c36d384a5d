"""One training step of a run: updates of tokenizer and transformer on recorded clips, and of the agent on transitions.

Everything in it is one compiled program of the training loop. What happens between steps (acting, imagining) is in
`jvgen.reinforcement.experience`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from jvgen.config import Config
from jvgen.control.drq_v2 import AgentState, DrQV2
from jvgen.control.replay import Transitions
from jvgen.data.stream.config import BucketConfig
from jvgen.models.ivideogpt import flops
from jvgen.nn.network import Network, Parameters
from jvgen.parallel import axes
from jvgen.reinforcement.config import ReinforcementConfig
from jvgen.tasks.task import ArraySpec, Batch, ExperienceContext, Metrics, Objective, OwnUpdate, Task
from jvgen.tasks.video_tokenizer import VideoTokenizer, VideoTokenizerConfig
from jvgen.tasks.world_model import WorldModelConfig, WorldModelTask

AGENT, TOKENIZER, TRANSFORMER = "agent", "tokenizer", "transformer"
# Arrays of a batch.
TRANSITIONS = "transitions/"
VIDEO, ACTIONS, REWARDS, SHORT_VIDEO = "video", "actions", "rewards", "short_video"


class ReinforcementTask(Task):
    """See `ReinforcementConfig`. Trains "encoder", "actor", "critic", and "tokenizer" and "transformer" if it has them.

    The objective "agent" has an update of its own, equal to the published DrQ-v2; its Adam states and target critics
    are saved where an optimizer's are.
    """

    program_per_activity = True

    def __init__(self, config: ReinforcementConfig):
        self.config, self.world = config, config.imagination
        self.agent = DrQV2(config.agent, (config.resolution, config.resolution, 3), config.action_width)
        self.networks: dict[str, Network] = dict(self.agent.networks)
        self.network_configs: dict[str, Config] = {}
        self.frozen_networks = {}
        if self.world is not None:
            world = self.world
            # Without dropout, which the published code leaves off here.
            tokenizer = world.tokenizer.replace(dropout=0.0)
            self.tokenizer = VideoTokenizer(
                VideoTokenizerConfig(
                    network=tokenizer,
                    perceptual=world.perceptual,
                    perceptual_weight=world.perceptual_weight,
                    moving_weight=world.moving_weight,
                    restart=world.restart,
                )
            )
            self.transformer = WorldModelTask(
                WorldModelConfig(
                    transformer=world.transformer,
                    tokenizer=world.tokenizer,
                    reward_weight=world.reward_weight,
                    evaluation_samples=0,
                )
            )
            self.networks |= {**self.tokenizer.networks, **self.transformer.networks}
            self.network_configs = {TOKENIZER: world.tokenizer, TRANSFORMER: world.transformer}
            self.frozen_networks = self.tokenizer.frozen_networks
        # The agent is small, and was published in float32; tokens are those of a float32 tokenizer.
        self.float32_networks = frozenset({*self.agent.networks, TOKENIZER, *self.frozen_networks})

    def load_frozen(self) -> Parameters:
        return {} if self.world is None else self.tokenizer.load_frozen()

    def frozen_digest(self) -> str:
        return "" if self.world is None else self.tokenizer.frozen_digest()

    def initial_parameters(self) -> Parameters:
        if self.world is None or self.world.pretrained is None:
            return {}
        from jvgen.reinforcement.pretrained import read_pretrained

        return read_pretrained(self.world)

    def experience(self, context: ExperienceContext) -> Any:
        from jvgen.reinforcement.experience import Experience

        return Experience(self, context)

    # Batches.

    def fields(self, bucket: BucketConfig) -> dict[str, ArraySpec]:
        config = self.config
        leading = (config.agent.updates_per_step, config.agent.batch_size // bucket.batch_size)
        side, stacked = config.resolution, 3 * config.agent.frame_stack

        def spec(shape: tuple[int, ...], dtype: type) -> ArraySpec:
            return ArraySpec(shape, np.dtype(dtype), (None,) * len(shape))

        frames = (*leading, side, side, stacked)
        transitions = Transitions(
            frames=spec(frames, np.uint8),
            actions=spec((*leading, config.action_width), np.float32),
            rewards=spec(leading, np.float32),
            discounts=spec(leading, np.float32),
            next_frames=spec(frames, np.uint8),
        )
        specs = {f"{TRANSITIONS}{name}": value for name, value in transitions._asdict().items()}
        if self.world is None:
            return specs
        short = self.world.tokenizer.context_frames + self.short_future(bucket)
        names = (axes.FRAMES, axes.HEIGHT, axes.WIDTH, None)
        for name, count in ((VIDEO, bucket.frames), (SHORT_VIDEO, short)):
            specs[name] = ArraySpec((count, side, side, 3), np.dtype(np.uint8), names)
        specs[ACTIONS] = ArraySpec((bucket.frames, config.action_width), np.dtype(np.float32), (axes.FRAMES, None))
        specs[REWARDS] = ArraySpec((bucket.frames,), np.dtype(np.float32), (axes.FRAMES,))
        return specs

    def short_future(self, bucket: BucketConfig) -> int:
        """Future frames of a clip in a tokenizer update."""
        return min(self.world.tokenizer_frames, bucket.frames - self.world.tokenizer.context_frames)

    def preprocess(self, example: dict[str, Any]) -> dict[str, np.ndarray]:
        raise AssertionError("batches of this task are made by its experience")

    # Updates.

    def objectives(self) -> tuple[Objective, ...]:
        fit = self.config.fit_steps
        own = OwnUpdate(self._start_agent, self._update_agent)
        agent = Objective(AGENT, "(encoder|actor|critic)/", own=own, start_step=fit)
        if self.world is None:
            return (agent,)

        def every(steps: int) -> dict[str, Any]:
            return {"update_schedule": (fit % steps, steps), "every_step_before": fit}

        return (
            Objective(TOKENIZER, "tokenizer/", self._tokenizer_loss, **every(self.world.tokenizer_every)),
            Objective(TRANSFORMER, "transformer/", self._transformer_loss, **every(self.world.transformer_every)),
            agent,
        )

    def loss(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        raise AssertionError("this task has objectives of its own")

    def _tokenizer_loss(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        return self.tokenizer.loss(parameters, frozen, {"video": batch[SHORT_VIDEO], "slot": batch["slot"]}, key)

    def _transformer_loss(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        rewards = batch[REWARDS]
        if self.world.released.reward_one_step_late:
            # What the loss takes as the reward of the action before a frame is that of the action after it.
            rewards = jnp.concatenate([rewards[:, 1:], rewards[:, -1:]], axis=1)
        given = {"video": batch[VIDEO], "actions": batch[ACTIONS], "rewards": rewards, "slot": batch["slot"]}
        return self.transformer.loss(parameters, {TOKENIZER: parameters[TOKENIZER]}, given, key)

    def after_update(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array, step: jax.Array
    ) -> Parameters:
        """Restarts of the tokenizer's dead codes, `restart.every` of its updates apart."""
        if self.world is None or not self.world.restart.every:
            return parameters
        given = {"video": batch[SHORT_VIDEO], "slot": batch["slot"]}
        # In steps that do not train the tokenizer there are no clips.
        active = next(objective for objective in self.objectives() if objective.name == TOKENIZER).active(step)
        updates = self.tokenizer_updates(step)

        def restarted() -> Parameters:
            return self.tokenizer.after_update(parameters, frozen, given, key, updates)

        return jax.lax.cond(active, restarted, lambda: parameters)

    def tokenizer_updates(self, step: jax.Array) -> jax.Array:
        """Updates of the tokenizer before a step."""
        fit, every = self.config.fit_steps, self.world.tokenizer_every
        return jnp.where(step < fit, step, fit + (jnp.maximum(step - fit, 0) + every - 1) // every)

    # The agent.

    def _start_agent(self, parameters: Parameters) -> dict[str, Any]:
        return {
            "optimizer": {name: self.agent.optimizer.init(value) for name, value in parameters.items()},
            "target": {"critic": jax.tree.map(jnp.copy, parameters["critic"])},
            "updates": jnp.zeros((), jnp.int32),
        }

    def _update_agent(
        self, parameters: Parameters, state: dict[str, Any], batch: Batch, key: jax.Array
    ) -> tuple[Parameters, dict[str, Any], Metrics]:
        config = self.config.agent
        noise = self.noise(batch["step"][0])
        transitions = Transitions(
            **{
                name: rearrange(batch[f"{TRANSITIONS}{name}"], "r u n ... -> u (r n) ...")
                for name in Transitions._fields
            }
        )
        agent = AgentState(parameters, state["target"]["critic"], state["optimizer"], state["updates"])

        def update(agent: AgentState, given: tuple[jax.Array, Transitions]) -> tuple[AgentState, dict[str, jax.Array]]:
            number, transitions = given
            random = self.agent.randomness(jax.random.fold_in(key, number), config.batch_size)
            return self.agent.update(agent, transitions, noise, random)

        agent, metrics = jax.lax.scan(
            update, agent, (jnp.arange(config.updates_per_step), transitions), unroll=axes.platform() == "cpu"
        )
        metrics = {name: jnp.mean(values) for name, values in metrics.items()}
        state = {"optimizer": agent.optimizer, "target": {"critic": agent.target}, "updates": agent.updates}
        return agent.parameters, state, {"loss": metrics.pop("critic_loss"), **metrics}

    def noise(self, step: jax.Array) -> jax.Array:
        """Standard deviation of exploration in a step of training."""
        config = self.config.agent
        return config.noise(config.random_steps + jnp.maximum(step - self.config.fit_steps, 0))

    def act(
        self, parameters: Parameters, frames: jax.Array, keys: jax.Array, noise: jax.Array, uniform: jax.Array
    ) -> jax.Array:
        """Actions for stacked frames `R H W S*C`: the policy's with noise of this deviation, or uniform ones."""

        def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            shape = (self.config.action_width,)
            one, other = (jax.random.fold_in(key, purpose) for purpose in range(2))
            return jax.random.normal(one, shape), jax.random.uniform(other, shape, minval=-1.0, maxval=1.0)

        normal, random = jax.vmap(draw)(keys)
        return jnp.where(uniform, random, self.agent.act(parameters, frames, noise * normal))

    def flops(self, bucket: BucketConfig) -> dict[str, float]:
        """Of the updates of a step of the agent, the world model's on average over steps."""
        config = self.config
        per_row = config.agent.updates_per_step * config.agent.batch_size / bucket.batch_size
        # Frames with their gradients, and next frames without.
        parts = {AGENT: per_row * self.agent.forward_flops() * 4 / 3}
        if self.world is not None:
            layout = self.world.tokenizer.layout(bucket.frames)
            tokenizing = sum(flops.tokenize(self.world.tokenizer, bucket.frames).values()) / 3
            forward = sum(flops.forward(self.world.transformer, layout).values()) + tokenizing
            short = self.world.tokenizer.context_frames + self.short_future(bucket)
            parts[TRANSFORMER] = forward / self.world.transformer_every
            reconstructing = sum(flops.reconstruct(self.world.tokenizer, short).values())
            parts[TOKENIZER] = reconstructing / self.world.tokenizer_every
        return parts
