"""Training of iVideoGPT's transformer: tokens of future frames, rewards and actions (arXiv 2405.15223)."""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jvgen.config import ConfigError
from jvgen.data.store.sources import open_source
from jvgen.data.stream.config import BucketConfig, DataConfig
from jvgen.data.stream.source_checks import check_pixels
from jvgen.diffusion.objective import slot_keys
from jvgen.evaluation.prediction import best_of
from jvgen.evaluation.reconstruction import WINDOW, peak_signal_to_noise, structural_similarity
from jvgen.finite import Clips
from jvgen.interop.architecture import check_architecture
from jvgen.interop.digest import content_digest, content_files
from jvgen.interop.from_torch import import_folder
from jvgen.losses.perceptual import PerceptualConfig
from jvgen.models.ivideogpt import flops
from jvgen.models.ivideogpt.config import MAX_ACTION, CompressiveTokenizerConfig, FrameTransformerConfig
from jvgen.models.ivideogpt.objective import loss_terms, symlog
from jvgen.models.ivideogpt.sampling import SamplingConfig
from jvgen.models.ivideogpt.tokenizer import CompressiveTokenizer
from jvgen.models.ivideogpt.transformer import FrameTransformer
from jvgen.models.ivideogpt.world import Prediction, World
from jvgen.nn import lora
from jvgen.nn.lora import LoraConfig
from jvgen.nn.network import Network, Parameters, run_frozen
from jvgen.parallel import axes
from jvgen.storage import Path, as_path, local_copy, read_json_object
from jvgen.tasks.perceptual import PerceptualDistance, check_weights
from jvgen.tasks.pixels import check_channels, signed_from_unit, unit_from_uint8, unit_to_clips
from jvgen.tasks.task import (
    ArraySpec,
    BaseNetwork,
    Batch,
    Mean,
    Metrics,
    SampleRequest,
    Task,
    TaskConfig,
    activation_dtype,
)
from jvgen.tasks.video_tokenizer import check_frames
from jvgen.value_rules import CountOrZero, Weight

# Purposes folded into a step's key; they never change, so that saved runs resume exactly.
DROPOUT_KEY = 48
ROLLOUT_KEY = 49
LORA_KEY = 52
# File of an export with the content digest of the tokenizer that the transformer was trained with, and whether its
# contexts begin with a goal.
TRAINED_WITH = "trained_with.json"


def check_trained_with(folder: Path) -> None:
    """Raise `ConfigError` if an export's tokenizer/ is not the one that its transformer/ was trained with."""
    record = folder / TRAINED_WITH
    trained_with = read_json_object(local_copy(record)).get("tokenizer") if record.is_file() else None
    if trained_with not in (None, content_digest(folder / "tokenizer")):
        raise ConfigError(
            f"{folder}: its tokenizer/ is not the one that its transformer/ was trained with; token ids would have "
            "other meanings. Copy the run's task.tokenizer_weights there, or, if the same weights were only saved "
            f'again, take "tokenizer" out of {record.name}.'
        )


def has_goal(folder: Path) -> bool:
    """Whether an export is of a run with `WorldModelConfig.goal`; False for one that does not say it."""
    record = folder / TRAINED_WITH
    return record.is_file() and bool(read_json_object(local_copy(record)).get("goal"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorldModelConfig(TaskConfig):
    """Next-token prediction over tokens of a frozen tokenizer, which runs inside the training step.

    Attributes:
      transformer: the trained network; action_width and reward select conditioning on actions and reward prediction.
      lora: train a LoRA of the transformer, and nothing else; needs transformer_weights. Checkpoints, moments and EMA
        are of the LoRA alone. Its targets are "transformer/...".
      transformer_weights: exported or published folder of the transformer, which is not trained; none to train it.
      tokenizer: architecture of the frozen tokenizer.
      tokenizer_weights: exported folder of the tokenizer's weights.
      goal: put the last frame first, as a goal: with two context frames, the goal and the current frame.
      reward_weight: weight of the squared error of rewards (in symlog).
      action_reconstruction_weight: weight of the squared error of reconstructed actions.
      tokenizer_dtype: "float32", as the published models were trained, or the compute dtype of the step ("compute").
      sampling: how ids are chosen in evaluation rollouts.
      evaluation_samples: rollouts per clip in evaluation, of which the best counts; 0 for no rollouts.
      perceptual: perceptual distance that is also measured of rollouts.
      visualize_clips: clips rolled out for TensorBoard.
    """

    transformer: FrameTransformerConfig
    tokenizer: CompressiveTokenizerConfig
    tokenizer_weights: str | None = None
    goal: bool = False
    reward_weight: Weight = 1.0
    action_reconstruction_weight: Weight = 0.0
    tokenizer_dtype: Literal["float32", "compute"] = "float32"
    sampling: SamplingConfig = SamplingConfig()
    evaluation_samples: CountOrZero = 1
    perceptual: PerceptualConfig = PerceptualConfig(kind="none")
    visualize_clips: CountOrZero = 4
    lora: LoraConfig | None = None
    transformer_weights: str | None = None

    def validate(self) -> None:
        check_channels("tokenizer.channels", self.tokenizer.channels)
        if self.lora is None and self.transformer_weights is not None:
            raise ValueError(
                f"transformer_weights = {self.transformer_weights!r} with lora = none: nothing would be trained. Set "
                "lora; or leave transformer_weights none, and make a run that starts with these weights by `jvgen "
                "import`."
            )
        self.transformer.check_tokenizer(self.tokenizer, self.tokenizer.context_frames + 1)
        if self.action_reconstruction_weight and not self.transformer.action_reconstruction:
            raise ValueError("action_reconstruction_weight needs transformer.action_reconstruction = true.")
        if self.goal and self.tokenizer.context_frames < 2:
            raise ValueError(
                f"goal needs at least 2 context frames (the goal and the current frame); the tokenizer has "
                f"{self.tokenizer.context_frames}."
            )

    def frames(self, bucket: BucketConfig) -> int:
        """Frames per sequence: those of the clip, after the goal if there is one."""
        return bucket.frames + self.goal

    @property
    def supports_prediction(self) -> bool:
        return True

    def check_bucket(self, bucket: BucketConfig) -> None:
        check_frames(self.tokenizer, bucket)
        if bucket.segment is not None:
            raise ValueError("segment: a world model needs consecutive frames; remove it.")
        if self.evaluation_samples and bucket.height < WINDOW:
            raise ValueError(f"height = {bucket.height}: must be at least {WINDOW}, the window of the SSIM metric.")
        self.transformer.check_tokenizer(self.tokenizer, self.frames(bucket))

    def check_weights(self) -> None:
        if self.tokenizer_weights is None:
            raise ValueError(
                "task.tokenizer_weights = none: set it to the exported folder of the tokenizer (`jvgen export`)."
            )
        check_architecture(self.tokenizer_weights, self.tokenizer, "task.tokenizer_weights")
        if self.transformer_weights is not None:
            check_architecture(self.transformer_weights, self.transformer, "task.transformer_weights")
        elif self.lora is not None:
            raise ValueError(
                "task.transformer_weights = none: a LoRA leaves this network as it is; name its exported folder."
            )
        check_weights(self.perceptual)

    def without_lora(self) -> "WorldModelConfig":
        return self.replace(lora=None, transformer_weights=None) if self.lora else self

    def check_data(self, data: DataConfig) -> None:
        width = self.transformer.action_width
        for source in (*data.sources, *data.evaluation_sources):
            check_pixels(source)
            if not width and not self.transformer.reward:
                continue
            opened = open_source(source.path, source.split)
            without = np.flatnonzero(~opened.index.has_action)
            if width and len(without):
                raise ValueError(
                    f"{source.path} [{source.split}]: {len(without)} of {len(opened)} recordings have no actions (the "
                    f"first is {opened.index.id[without[0]]}), but transformer.action_width = {width}. Build the data "
                    "set without them, or set action_width = 0."
                )
            first = opened.read(0)
            if width and first.actions.shape[1] != width:
                raise ValueError(
                    f"{source.path} [{source.split}]: actions have {first.actions.shape[1]} numbers, but "
                    f"transformer.action_width = {width}; make them equal."
                )
            if self.transformer.reward and not first.rewards.size:
                raise ValueError(
                    f"{source.path} [{source.split}]: recordings have no rewards, but transformer.reward = true."
                )

    def check_request(self, request: SampleRequest) -> None:
        raise ValueError("a world model generates no clips from prompts: step it with actions, `jvgen play RUN`.")

    def build(self) -> "WorldModelTask":
        return WorldModelTask(self)


class WorldModelTask(Task):
    """See `WorldModelConfig`. Trains "transformer", or "lora" instead."""

    def __init__(self, config: WorldModelConfig):
        self.config = config
        self.transformer_network = Network.of(lambda rngs: FrameTransformer(config.transformer, rngs=rngs))
        self.networks = {"transformer": self.transformer_network}
        self.network_configs = {"transformer": config.transformer}
        tokenizer = Network.of(lambda rngs: CompressiveTokenizer(config.tokenizer, rngs=rngs))
        self.perceptual = PerceptualDistance(config.perceptual)
        self.frozen_networks = {"tokenizer": tokenizer, **self.perceptual.networks}
        if config.lora is not None:
            refused = dict.fromkeys(self.frozen_networks, "which stays as it is in this task")
            layers = lora.targets(config.lora, self.networks, refused)
            self.frozen_networks["transformer"], self.network_configs = self.transformer_network, {}
            self.base_networks = {"transformer": BaseNetwork(config.transformer, config.transformer_weights)}
            self.backward_passes = 1
            self.networks = {lora.TREE: Network.of(lambda rngs: lora.Factors(layers, rank=config.lora.rank, rngs=rngs))}
        tokenizer_names = {"tokenizer"} if config.tokenizer_dtype == "float32" else set()
        self.float32_networks = frozenset(tokenizer_names | set(self.perceptual.networks))

    def load_frozen(self) -> Parameters:
        frozen = {"tokenizer": import_folder(self.config.tokenizer_weights)[1], **self.perceptual.load()}
        if self.config.transformer_weights is not None:
            frozen["transformer"] = import_folder(self.config.transformer_weights)[1]
        return frozen

    def frozen_digest(self) -> str:
        weights = self.config.tokenizer_weights
        digests = ["" if weights is None else content_digest(weights), self.perceptual.digest()]
        digests += [content_digest(folder) for folder in (self.config.transformer_weights,) if folder is not None]
        return "+".join(digest for digest in digests if digest)

    def exported_files(self) -> dict[str, str | Path]:
        """The tokenizer as it is, and its digest, neither if it is not there any more; and whether there is a goal."""
        weights, tokenizer, record = self.config.tokenizer_weights, {}, {}
        if weights is not None and as_path(weights).is_dir():
            tokenizer = {f"tokenizer/{file.name}": file for file in content_files(local_copy(weights))}
            record["tokenizer"] = content_digest(weights)
        if self.config.goal:
            record["goal"] = True
        return {**({TRAINED_WITH: json.dumps(record) + "\n"} if record else {}), **tokenizer}

    # Batches.

    def fields(self, bucket: BucketConfig) -> dict[str, ArraySpec]:
        frames, width = bucket.frames, self.config.transformer.action_width
        names = (axes.FRAMES, axes.HEIGHT, axes.WIDTH, None)
        specs = {"video": ArraySpec((frames, bucket.height, bucket.width, 3), np.dtype(np.uint8), names)}
        if width:
            specs["actions"] = ArraySpec((frames, width), np.dtype(np.float32), (axes.FRAMES, None))
        if self.config.transformer.reward:
            specs["rewards"] = ArraySpec((frames,), np.dtype(np.float32), (axes.FRAMES,))
        return specs

    def preprocess(self, example: dict[str, Any]) -> dict[str, np.ndarray]:
        if "video" not in example:
            raise ValueError("the data set has cached latents and no pixels: a world model needs pixels.")
        arrays, width = {"video": example["video"]}, self.config.transformer.action_width
        if width:
            actions = np.asarray(example["actions"], np.float32)
            if not example["has_action"] or actions.shape[-1] != width:
                found = f"{actions.shape[-1]} numbers" if example["has_action"] else "none"
                raise ValueError(f"a recording's actions have {found}; transformer.action_width = {width}.")
            if not np.all(np.abs(actions) <= MAX_ACTION):
                raise ValueError(
                    f"a recording's actions reach {np.abs(actions).max():g}: they must be finite and at most "
                    f"{MAX_ACTION:g}. Build the data set again with --clip-actions."
                )
            arrays["actions"] = actions
        if self.config.transformer.reward:
            if not example.get("has_reward", True):
                raise ValueError(
                    "a recording has no rewards; transformer.reward = true. Build the data set of those that have "
                    "them, or set reward = false."
                )
            rewards = np.asarray(example["rewards"], np.float32)
            if not np.isfinite(rewards).all():
                raise ValueError("a recording's rewards are not all finite numbers.")
            arrays["rewards"] = rewards
        return arrays

    # Loss.

    def loss(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        keys, of_lora = (slot_keys(jax.random.fold_in(key, p), batch["slot"]) for p in (DROPOUT_KEY, LORA_KEY))
        return self._loss(parameters, frozen, batch, keys, of_lora)

    def _loss(
        self,
        parameters: Parameters,
        frozen: Parameters,
        batch: Batch,
        keys: jax.Array | None,
        lora_keys: jax.Array | None = None,
    ) -> tuple[jax.Array, Metrics]:
        config, batch, weights = self.config, self._ordered(batch), {**frozen, **parameters}
        video = unit_from_uint8(batch["video"])
        layout = config.tokenizer.layout(video.shape[1])
        frames = video.astype(activation_dtype(frozen["tokenizer"]))
        tokenizer = self.frozen_networks["tokenizer"]
        tokens = run_frozen(
            lambda: layout.flatten(*tokenizer.apply(frozen["tokenizer"], frames, method="tokenize")), len(video)
        )
        actions, rewards = (batch.get(name) for name in ("actions", "rewards"))
        # The action that leads to each future frame, and its reward. The released code learns the reward of the action
        # after the frame, and uses the prediction as that of the action before it.
        terms = loss_terms(
            lora.bind(self.transformer_network, "transformer", weights, config.lora, lora_keys),
            tokens,
            layout,
            actions=None if actions is None else actions[:, layout.action_frames],
            rewards=None if rewards is None else symlog(rewards[:, layout.action_frames]),
            keys=keys,
            dtype=activation_dtype(weights["transformer"]),
        )
        total = terms.cross_entropy
        metrics: Metrics = {"cross_entropy": terms.cross_entropy, "accuracy": terms.accuracy}
        if terms.reward is not None:
            total += config.reward_weight * terms.reward
            metrics["reward_error"] = terms.reward
        if terms.action_reconstruction is not None:
            total += config.action_reconstruction_weight * terms.action_reconstruction
            metrics["action_error"] = terms.action_reconstruction
        return total, metrics

    def _ordered(self, batch: Batch) -> dict[str, jax.Array]:
        """The batch with the goal frame first, and its action and reward with it."""
        if not self.config.goal:
            return dict(batch)
        per_frame = {"video", "actions", "rewards"} & set(batch)
        return {
            name: jnp.concatenate([value[:, -1:], value], axis=1) if name in per_frame else value
            for name, value in batch.items()
        }

    # Rollouts.

    def transformer(self, parameters: Parameters, frozen: Parameters) -> Parameters:
        """The transformer's parameters, with a LoRA merged into them: decoding has each layer's kernels by itself."""
        return lora.whole("transformer", {**frozen, **parameters}, self.config.lora)

    def world(self, frames: int, dtype: Any = jnp.float32) -> World:
        """The world model for clips of this many frames, context (and goal) included."""
        config = self.config
        return World(config.tokenizer, config.transformer, frames, config.sampling, dtype=dtype, goal=config.goal)

    def predict(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array, samples: int = 1
    ) -> tuple[Prediction, dict[str, jax.Array]]:
        """Rollouts from the context frames of a batch, `samples` per clip; and the batch in the order of sequences."""
        ordered, count = self._ordered(batch), self.config.tokenizer.context_frames
        video = unit_from_uint8(ordered["video"])
        transformer = self.transformer(parameters, frozen)
        world = self.world(video.shape[1], activation_dtype(transformer))
        weights = world.prepare(frozen["tokenizer"], transformer)
        actions = ordered.get("actions")
        if actions is not None:
            actions = jnp.repeat(actions[:, world.layout.action_frames], samples, axis=0)
        keys = slot_keys(jax.random.fold_in(key, ROLLOUT_KEY), batch["slot"])
        keys = jax.vmap(lambda one: jax.vmap(lambda i: jax.random.fold_in(one, i))(jnp.arange(samples)))(keys)
        context = video[:, :count].astype(activation_dtype(frozen["tokenizer"]))
        return world.rollout(weights, context, actions, keys.reshape(-1)), ordered

    def predicted_clips(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Recorded clips `B F H W 3`, and predictions with reconstructed context frames, float32 in [0, 1]."""
        samples, count = max(1, self.config.evaluation_samples), self.config.tokenizer.context_frames
        prediction, ordered = self.predict(parameters, frozen, batch, key, samples)
        video = unit_from_uint8(ordered["video"])
        tokenizer = self.frozen_networks["tokenizer"].bind(frozen["tokenizer"])
        context = video[:, :count].astype(activation_dtype(frozen["tokenizer"]))
        reconstructed, _ = tokenizer.detokenize_context(tokenizer.tokenize_context(context), context.dtype)
        reconstructed = jnp.repeat(jnp.clip(reconstructed.astype(jnp.float32), 0.0, 1.0), samples, axis=0)
        return video, jnp.concatenate([reconstructed, prediction.frames], axis=1)

    def evaluate(self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array) -> Metrics:
        """The loss without dropout, and image metrics of rollouts against the recording.

        Each metric is that of the best of several samples of a clip. Plain names are of predicted frames only;
        "whole_..." includes the reconstructed context frames, as published numbers do; "..._copying" is of the last
        context frame, repeated.
        """
        loss, metrics = self._loss(parameters, frozen, batch, None)
        metrics = {"loss": loss, **metrics}
        samples, count = self.config.evaluation_samples, self.config.tokenizer.context_frames
        if not samples:
            return metrics
        video, predicted = self.predicted_clips(parameters, frozen, batch, key)
        clips = jnp.float32(video.shape[0])
        predicted = predicted.reshape(video.shape[0], samples, *predicted.shape[1:])
        last = jnp.broadcast_to(video[:, count - 1 : count], video[:, count:].shape)
        for name, (measure, higher_is_better) in self._measures(frozen).items():
            score = measure(predicted, jnp.broadcast_to(video[:, None], predicted.shape))
            for prefix, counted in (("", score[..., count:]), ("whole_", score)):
                best = best_of(counted, higher_is_better=higher_is_better)
                metrics[f"{prefix}{name}"] = Mean(jnp.sum(best), clips)
            copied = jnp.mean(measure(last, video[:, count:]), axis=-1)
            metrics[f"{name}_copying"] = Mean(jnp.sum(copied), clips)
        return metrics

    def _measures(self, frozen: Parameters) -> dict[str, tuple[Callable[[jax.Array, jax.Array], jax.Array], bool]]:
        """Per-frame metrics of frames in [0, 1] by name, and whether higher is better."""
        measures = {
            "psnr": (functools.partial(peak_signal_to_noise, data_range=1.0), True),
            "ssim": (functools.partial(structural_similarity, data_range=1.0), True),
        }

        def distance(predicted: jax.Array, recorded: jax.Array) -> jax.Array:
            images = (signed_from_unit(frames.reshape(-1, *frames.shape[-3:])) for frames in (predicted, recorded))
            return self.perceptual.distance(frozen, *images).reshape(predicted.shape[:-3])

        if self.perceptual.enabled:
            measures[self.perceptual.metric_name] = (distance, False)
        return measures

    def visualize(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array
    ) -> dict[str, jax.Array | Clips]:
        if not self.config.visualize_clips:
            return {}
        shown = {name: value[: self.config.visualize_clips] for name, value in batch.items()}
        prediction, ordered = self.predict(parameters, frozen, shown, key)
        context = ordered["video"][:, : self.config.tokenizer.context_frames]
        made = unit_to_clips(prediction.frames)
        return {
            "data": ordered["video"],
            "rollout": Clips(jnp.concatenate([context, made.pixels], axis=1), made.finite),
        }

    def flops(self, bucket: BucketConfig) -> dict[str, float]:
        tokenizer, frames = self.config.tokenizer, self.config.frames(bucket)
        parts = flops.forward(self.config.transformer, tokenizer.layout(frames))
        return {**parts, "tokenizer": sum(flops.tokenize(tokenizer, frames).values())}
