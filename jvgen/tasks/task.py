"""What a task is: the interface between a kind of training run and the training loop, samplers and exporters."""

import abc
import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jvgen.config import Config
from jvgen.data.stream.config import BucketConfig, DataConfig
from jvgen.finite import Clips, Finite
from jvgen.models.video_dit.enhance import EnhanceConfig
from jvgen.nn import lora
from jvgen.nn.adaptation import Adaptation
from jvgen.nn.network import Network, Parameters
from jvgen.parallel.axes import Axes
from jvgen.parallel.rules import Sharding
from jvgen.storage import Path
from jvgen.tasks.given_frames import GivenPixels

# Arrays by name. Always has "slot": int32 (B,), the index of each example in the global batch, for random draws;
# in training also "step": int32 (B,), the index of the step, for losses that change with it.
Batch = Mapping[str, jax.Array]


class Mean(NamedTuple):
    """A metric as a sum and a count, both of which add up over microbatches, devices and steps."""

    total: jax.Array
    count: jax.Array


class CodeUse(NamedTuple):
    """How often each code of a codebook occurred; adds up over batches, devices and processes.

    It stands for two values: the share of the codes that occur at all, and the perplexity of their frequencies. Neither
    can be averaged: a batch of n tokens uses at most n codes.
    """

    counts: jax.Array

    def summary(self) -> dict[str, float]:
        """The values, of counts on the host: "codes_used" in 0..1, and "perplexity" from 1 to the number of codes."""
        counts = np.asarray(self.counts, np.float64)
        share = counts[counts > 0] / max(counts.sum(), 1.0)
        return {"codes_used": float(np.mean(counts > 0)), "perplexity": float(np.exp(-np.sum(share * np.log(share))))}


Metrics = dict[str, jax.Array | Mean | CodeUse]


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """One named array of an example: shape without the batch axis, dtype, one logical name (or None) per axis."""

    shape: tuple[int, ...]
    dtype: np.dtype
    axes: Axes


def activation_dtype(parameters: Parameters) -> jnp.dtype:
    """The dtype to compute activations in: the narrowest floating dtype among the parameters.

    The training step casts matrices to the compute dtype and leaves vectors in float32.
    """
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(parameters) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    return min(dtypes, key=lambda dtype: jnp.finfo(dtype).bits)


@dataclasses.dataclass(frozen=True)
class SampleRequest:
    """What a user asks of generated clips; None stands for the task's default.

    Attributes:
      frames, height, width: of the clips, in pixels.
      steps: sampler steps.
      guidance: scale of classifier-free guidance.
      enhance: Enhance-A-Video's scaling of attention.
      given_frames: number of images that each clip (or each of its views) is made from.
      strength: how much of a given video is changed, above 0 and up to 1; None without one.
    """

    frames: int
    height: int
    width: int
    steps: int | None = None
    guidance: float | None = None
    enhance: EnhanceConfig | None = None
    given_frames: int = 0
    strength: float | None = None


class Generated(NamedTuple):
    """New clips `B F H W 3`, or views of them `B V F H W 3`, uint8, and how far their numbers were finite."""

    pixels: jax.Array
    finite: Finite


@dataclasses.dataclass(frozen=True)
class ExperienceContext:
    """What a task that collects its own data is told of the run.

    Attributes:
      data: names the environment as its source, and the shape of batches.
      seed: of the run.
      folder: the run directory.
      sharding: of the run's devices.
      log: takes messages for the user.
      check: called now and then while the run starts; what it raises (a request to stop) ends it.
    """

    data: DataConfig
    seed: int
    folder: Path
    sharding: Sharding
    log: Callable[[str], None]
    check: Callable[[], None]


LossFunction = Callable[[Parameters, Parameters, Batch, jax.Array], tuple[jax.Array, Metrics]]


@dataclasses.dataclass(frozen=True)
class OwnUpdate:
    """How an objective changes its parameters where that is not one step of an optimizer (an actor after its critic).

    Attributes:
      init: the objective's parameters -> its state, which is saved where an optimizer's is.
      apply: (parameters, state, batch, key) -> (parameters, state, metrics): pure, in float32, with a scalar "loss"
        among the metrics. A step in which the loss or the new parameters are not finite is skipped.
    """

    init: Callable[[Parameters], Any]
    apply: Callable[[Parameters, Any, Batch, jax.Array], tuple[Parameters, Any, Metrics]]


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss and the parameters that it trains.

    Objectives with the same loss function are differentiated together, in one forward and backward pass, and have an
    optimizer each. So adversaries can share a pass: the sum of their losses, separated by `jax.lax.stop_gradient`.

    Attributes:
      name: appears in metric names when there is more than one objective.
      parameters: regular expression over parameter paths ("denoiser/blocks/..."), matched from the start.
      loss: `(parameters, frozen, batch, key) -> (scalar float32 loss, metrics)`; gets all parameters. None with `own`.
      update_schedule: (index, period): active in the steps with step % period == index, at no cost in other steps.
      every_step_before: also active in all steps before this one.
      start_step: inactive before this step. Objectives with the same loss are active in the same steps.
      own: changes the parameters without `loss` and an optimizer.
    """

    name: str
    parameters: str
    loss: LossFunction | None = None
    update_schedule: tuple[int, int] = (0, 1)
    every_step_before: int = 0
    start_step: int = 0
    own: OwnUpdate | None = None

    @property
    def schedule(self) -> tuple[int, ...]:
        """What decides in which steps it is active."""
        return (*self.update_schedule, self.every_step_before, self.start_step)

    @property
    def always_active(self) -> bool:
        """Whether it is active in every step."""
        return self.update_schedule[1] == 1 and not self.start_step

    def active(self, step: jax.Array | int) -> jax.Array | bool:
        """Whether it is active in a step (int32 scalar, or a number): a boolean scalar."""
        index, period = self.update_schedule
        return (step >= self.start_step) & ((step % period == index) | (step < self.every_step_before))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig(Config):
    """Base of every task's configuration."""

    def build(self) -> "Task":
        """The task that this configuration describes. Reads no weights and allocates nothing on a device."""
        raise AssertionError("a TaskConfig subclass defines build()")

    def check_bucket(self, bucket: BucketConfig) -> None:
        """Raise `ValueError` for a clip size that the networks cannot take (sizes that do not divide)."""

    def check_weights(self) -> None:
        """Raise `ValueError` for files of frozen networks that are missing or of another network; loads none."""

    def check_data(self, data: DataConfig) -> None:
        """Raise `ValueError` for data sets that were made with other weights than the task's."""

    def for_prompts(self) -> "TaskConfig":
        """The configuration by which a trained run takes prompts that no data set has."""
        return self

    def with_vae(self, folder: str) -> "TaskConfig":
        """The configuration by which a run that was trained on cached latents, and names no VAE, makes clips.

        Args:
          folder: of the VAE that made the latents, as `jvgen export` or diffusers write it.

        Raises:
          ValueError: a task without latents or with a VAE of its own, or a VAE that does not fit the latents.
        """
        raise ValueError(f"--vae {folder}: {type(self).__name__} has no latents to decode; leave it out.")

    def without_lora(self) -> "TaskConfig":
        """The configuration of a run that trains what this one's LoRA is beside; this one if it trains none."""
        return self

    @property
    def collects_experience(self) -> bool:
        """Whether batches come from `Task.experience` instead of data sets; sources then name environments."""
        return False

    @property
    def supports_sampling(self) -> bool:
        """Whether `Task.generate` or `Task.generate_views` makes clips from captions."""
        return False

    @property
    def supports_views(self) -> bool:
        """Whether `Task.generate_views` generates several views of a scene."""
        return False

    @property
    def supports_prediction(self) -> bool:
        """Whether `Task.predicted_clips` predicts recorded clips from their first frames."""
        return False

    def frames_of(self, bucket: BucketConfig) -> int:
        """Frames per clip in the examples of a bucket."""
        return bucket.frames

    def check_request(self, request: SampleRequest) -> None:
        """Raise `ValueError` for clips that a run of this task cannot generate."""
        raise ValueError(
            f"{type(self).__name__}: generates nothing from prompts; `jvgen sample` needs a text-to-video run."
        )


@dataclasses.dataclass(frozen=True)
class BaseNetwork:
    """A frozen network that a LoRA may be of: its configuration, and the folder of its weights (None if not named)."""

    config: Config
    weights: str | None


class Task(abc.ABC):
    """One kind of training run. All methods with `parameters` are pure and are traced under `jax.jit`.

    Attributes:
      networks: trained networks by name; the parameter tree is `{name: network parameters}`.
      network_configs: the configuration of each trained network, by the same names, for export.
      frozen_networks: networks that are not trained (a VAE, a text encoder), kept out of checkpoints and optimizers.
      program_per_activity: on CPUs, compile a training step for each set of objectives that are active together:
        convolutions are about fifty times slower there in a branch of one program for all.
      float32_networks: names of frozen networks that stay float32 for any compute dtype.
      base_networks: of a task that trains a LoRA, the frozen networks that it may be of, by name.
      backward_passes: FLOPs of the backward pass of trained networks, in forward passes: 2, or 1 where kernels have no
        gradients (a LoRA); 2 for attention in any case.
    """

    networks: dict[str, Network]
    network_configs: dict[str, Config]
    frozen_networks: dict[str, Network]
    float32_networks: frozenset[str] = frozenset()
    program_per_activity: bool = False
    base_networks: Mapping[str, "BaseNetwork"] = types.MappingProxyType({})
    backward_passes: int = 2

    @property
    def adapted_networks(self) -> frozenset[str]:
        """Names of the frozen networks that a LoRA is trained for: they have a backward pass."""
        return frozenset(self.networks[lora.TREE].shapes) if lora.TREE in self.networks else frozenset()

    def init(self, key: jax.Array) -> Parameters:
        """Random float32 parameters of all trained networks."""
        names = sorted(self.networks)
        keys = jax.random.split(key, len(names))
        return {name: self.networks[name].init(k) for name, k in zip(names, keys, strict=True)}

    def axes(self) -> Parameters:
        """Logical axes of every trained parameter."""
        return {name: network.axes for name, network in sorted(self.networks.items())}

    def frozen_axes(self) -> Parameters:
        """Logical axes of every frozen parameter."""
        return {name: network.axes for name, network in sorted(self.frozen_networks.items())}

    def adapted_parameters(self) -> Mapping[str, Adaptation]:
        """How parameters begin, by path, that a run which this one starts from has in another shape, or not at all."""
        return {}

    def load_frozen(self) -> Parameters:
        """Parameters of `frozen_networks` from the files that the configuration names, as numpy arrays."""
        return {}

    def frozen_digest(self) -> str:
        """Content hash of the files that `load_frozen` reads, stored in checkpoints and compared on resume."""
        return ""

    def experience(self, context: "ExperienceContext") -> Any:
        """The source of batches of a task that acts in an environment while it trains, with the interface of
        `jvgen.reinforcement.experience.Experience`; None for tasks that are trained on data sets."""
        return None

    def initial_parameters(self) -> Parameters:
        """Parameters of trained networks that a new run starts with, from files, as numpy arrays; others are random."""
        return {}

    @abc.abstractmethod
    def fields(self, bucket: BucketConfig) -> dict[str, ArraySpec]:
        """The arrays of one preprocessed example of a bucket."""

    @abc.abstractmethod
    def preprocess(self, example: dict[str, Any]) -> dict[str, np.ndarray]:
        """The arrays of `fields`, in numpy, of one decoded example (see `jvgen.data.stream.transforms`)."""

    @abc.abstractmethod
    def loss(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Scalar float32 loss (a mean over the batch) and metrics. `key` is used for this step only."""

    def objectives(self) -> tuple[Objective, ...]:
        """The losses and the parameters that each trains; by default one loss over all parameters."""
        return (Objective("model", ".*", self.loss),)

    def after_update(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array, step: jax.Array
    ) -> Parameters:
        """The parameters after changes that are not made by gradients (codebook restarts); by default unchanged.

        Args:
          parameters: float32, after the optimizers' update.
          key: used for this step and purpose only.
          step: int32 scalar, number of steps before this one.
        """
        return parameters

    def evaluate(self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array) -> Metrics:
        """Metrics on a held-out batch; by default the training loss."""
        loss, metrics = self.loss(parameters, frozen, batch, key)
        return {"loss": loss, **metrics}

    def visualize(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array
    ) -> dict[str, jax.Array | Clips]:
        """Clips for TensorBoard, `B F H W 3` by name ("data", "sample"): uint8, or `Clips` of what networks made.

        Traced under jit.
        """
        return {}

    def recorded_clips(self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array) -> jax.Array:
        """The clips of a batch as pixels, float32 in [0, 1], `B F H W 3` or `B V F H W 3`; traced under jit.

        For tasks whose configuration has `supports_sampling`; decoded where the batch has latents.
        """
        raise NotImplementedError(f"{type(self).__name__} generates no clips.")

    def predicted_clips(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Recorded clips `B F H W 3` and predictions of them `N F H W 3`, float32 in [0, 1]; traced under jit.

        For tasks whose configuration has `supports_prediction`.
        """
        raise NotImplementedError(f"{type(self).__name__} predicts no clips.")

    def analyze_layers(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array, timestep: jax.Array
    ) -> dict[str, jax.Array]:
        """Statistics of every layer on held-out clips at one noise level, with a leading axis of layers; traced.

        Raises:
          ValueError: a task without such layers.
        """
        raise ValueError(f"{type(self).__name__} has no denoiser layers to analyze; give a text-to-video run.")

    def tokens(self, prompts: Sequence[str]) -> np.ndarray:
        """Prompts as token ids, `B L` int32, the form that `generate` takes."""
        raise NotImplementedError(
            f"{type(self).__name__} generates nothing: its configuration's check_request() says so."
        )

    def truncated_text(self, prompt: str) -> str:
        """The end of a prompt that is longer than what `tokens` keeps; "" if all of it is kept."""
        return ""

    def generate(
        self,
        parameters: Parameters,
        frozen: Parameters,
        tokens: jax.Array,
        slots: jax.Array,
        key: jax.Array,
        request: SampleRequest,
        given: GivenPixels | None = None,
    ) -> Generated:
        """New clips, uint8 `B F H W 3`; clip i depends on the key and on `slots[i]` only. Traced under jit.

        Args:
          given: images or a video, as the request says; None for clips from captions alone.
        """
        raise NotImplementedError(
            f"{type(self).__name__} generates nothing: its configuration's check_request() says so."
        )

    def generate_views(
        self,
        parameters: Parameters,
        frozen: Parameters,
        tokens: jax.Array,
        cameras: Any,
        slots: jax.Array,
        key: jax.Array,
        request: SampleRequest,
        given: GivenPixels | None = None,
    ) -> Generated:
        """New views of scenes, uint8 `B V F H W 3`; traced under jit.

        For tasks whose configuration has `supports_views`.

        Args:
          cameras: `jvgen.geometry.cameras.Cameras`, one per frame and view: `B V F 4` and `B V F 3 4`.
          given: see `generate`.
        """
        raise NotImplementedError(f"{type(self).__name__} generates single clips, not several views.")

    def exported_files(self) -> dict[str, str | Path]:
        """Further files of an export by relative path: text (a scheduler's configuration), or local files to copy."""
        return {}

    def sequence_length(self, bucket: BucketConfig) -> int:
        """Tokens of one example in the network that is trained; 0 for networks without a sequence of tokens."""
        return 0

    def flops(self, bucket: BucketConfig) -> dict[str, float]:
        """Forward FLOPs of one example in a training step, by component; the backward pass counts twice as many.

        Components of a frozen network ("vae", "vae/encoder") start with its name: they have no backward pass. Losses by
        frozen networks (perceptual distances) are not counted.
        """
        return {}
