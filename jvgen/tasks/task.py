"""What a task is: everything that the training loop, the sampler and the exporters need to know of what is trained."""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jvgen.config import Config
from jvgen.data.stream.config import BucketConfig, DataConfig
from jvgen.models.video_dit.enhance import EnhanceConfig
from jvgen.nn.network import Network, Parameters
from jvgen.parallel.axes import Axes

# Arrays by name. Always holds "slot": int32 (B,), the number of each example in the global batch, to derive draws from;
# in training also "step": int32 (B,), the number of the step, for losses that change with it.
Batch = Mapping[str, jax.Array]


class Mean(NamedTuple):
    """A metric as a sum and the number of things summed, so that it adds up over microbatches, devices and steps."""

    total: jax.Array
    count: jax.Array


Metrics = dict[str, jax.Array | Mean]


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """One named array of an example: shape without the batch axis, dtype, and a logical name (or None) per axis."""

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
    """What a user may ask of generated clips; None leaves it to the task.

    Attributes:
      frames, height, width: of the clips, in pixels.
      steps: sampler steps.
      guidance: scale of classifier-free guidance.
      enhance: scaling of attention across frames.
    """

    frames: int
    height: int
    width: int
    steps: int | None = None
    guidance: float | None = None
    enhance: EnhanceConfig | None = None


LossFunction = Callable[[Parameters, Parameters, Batch, jax.Array], tuple[jax.Array, Metrics]]


@dataclasses.dataclass(frozen=True)
class Objective:
    """One player of the training game: a loss and the parameters that it moves.

    Players with the same loss function are differentiated together, in one forward and backward pass, and then moved by
    their own optimizers. So players against each other can share a pass: a sum of their losses, kept apart by
    `jax.lax.stop_gradient`.

    Attributes:
      name: appears in metric names when there is more than one objective.
      parameters: regular expression over parameter paths ("denoiser/blocks/..."), matched from the start.
      loss: `(parameters, frozen, batch, key) -> (scalar float32 loss, metrics)`; sees all parameters.
      turn: (index, period): it acts in the steps whose number is index modulo period, and costs nothing in others;
        equal for players with the same loss.
    """

    name: str
    parameters: str
    loss: LossFunction
    turn: tuple[int, int] = (0, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig(Config):
    """Base of every task's configuration."""

    def build(self) -> "Task":
        """The task described by this configuration. Reads no weights and allocates nothing on a device."""
        raise AssertionError("a TaskConfig subclass defines build()")

    def check_bucket(self, bucket: BucketConfig) -> None:
        """Raise `ValueError` for a batch shape that the networks cannot take (sizes that do not divide)."""

    def check_weights(self) -> None:
        """Raise `ValueError` for files of frozen networks that are missing or hold another network; loads none."""

    def check_data(self, data: DataConfig) -> None:
        """Raise `ValueError` for data sets that were made with other weights than the task's."""

    @property
    def sees_views(self) -> bool:
        """Whether `Task.generate_views` makes several views of a scene."""
        return False

    @property
    def predicts_clips(self) -> bool:
        """Whether `Task.predicted_clips` predicts recorded clips from their first frames."""
        return False

    def frames_of(self, bucket: BucketConfig) -> int:
        """Frames of each clip that comes of a bucket's examples."""
        return bucket.frames

    def check_request(self, request: SampleRequest) -> None:
        """Raise `ValueError` for clips that a run of this task cannot generate."""
        raise ValueError(
            f"{type(self).__name__}: generates nothing from prompts; `jvgen sample` needs a text-to-video run."
        )


class Task(abc.ABC):
    """One kind of training run. All methods with `parameters` are pure and are traced under `jax.jit`.

    Attributes:
      networks: trained networks by name; the parameter tree is `{name: network parameters}`.
      network_configs: the configuration of each trained network, by the same names, for export.
      frozen_networks: networks that are only read (a VAE, a text encoder), kept out of checkpoints and optimizers.
      keeps_float32: names of frozen networks that stay float32 whatever the compute dtype.
    """

    networks: dict[str, Network]
    network_configs: dict[str, Config]
    frozen_networks: dict[str, Network]
    keeps_float32: frozenset[str] = frozenset()

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

    def load_frozen(self) -> Parameters:
        """Parameters of `frozen_networks` read from the files that the configuration names, as host arrays."""
        return {}

    def frozen_digest(self) -> str:
        """Content hash of what `load_frozen` reads, stored in checkpoints and compared on resume."""
        return ""

    @abc.abstractmethod
    def fields(self, bucket: BucketConfig) -> dict[str, ArraySpec]:
        """The arrays of one prepared example of a bucket."""

    @abc.abstractmethod
    def prepare(self, example: dict[str, Any]) -> dict[str, np.ndarray]:
        """Turn one decoded example (see `jvgen.data.stream.transforms`) into the arrays of `fields`, in numpy."""

    @abc.abstractmethod
    def loss(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Scalar float32 loss (a mean over the batch) and metrics. `key` belongs to this step alone."""

    def objectives(self) -> tuple[Objective, ...]:
        """What is minimised over what; one loss over everything unless a task says otherwise."""
        return (Objective("model", ".*", self.loss),)

    def after_update(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array, step: jax.Array
    ) -> Parameters:
        """The parameters after a step, with what no gradient does to them; unchanged unless a task says otherwise.

        Args:
          parameters: float32, as the optimizers left them.
          key: of this step and purpose alone.
          step: int32 scalar, steps done before this one.
        """
        return parameters

    def evaluate(self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array) -> Metrics:
        """Metrics on a held-out batch; the training loss unless a task says otherwise."""
        loss, metrics = self.loss(parameters, frozen, batch, key)
        return {"loss": loss, **metrics}

    def visualize(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array
    ) -> dict[str, jax.Array]:
        """uint8 clips to look at, `B F H W 3` by name ("reconstruction", "sample"); traced under jit."""
        return {}

    def predicted_clips(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Recorded clips `B F H W 3` and predictions of them `N F H W 3`, float32 in [0, 1], for tasks whose
        configuration `predicts_clips`; traced under jit."""
        raise NotImplementedError(f"{type(self).__name__} predicts no clips.")

    def look_at_layers(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array, timestep: jax.Array
    ) -> dict[str, jax.Array]:
        """Measures of every layer on held-out clips at a noise level, with a leading axis of layers; traced under jit.

        Raises:
          ValueError: a task without such layers.
        """
        raise ValueError(f"{type(self).__name__} has no denoiser's layers to look at; give a text-to-video run.")

    def tokens(self, prompts: Sequence[str]) -> np.ndarray:
        """Prompts as `generate` takes them, `B L` int32."""
        raise NotImplementedError(
            f"{type(self).__name__} generates nothing: its configuration's check_request() says so."
        )

    def generate(
        self,
        parameters: Parameters,
        frozen: Parameters,
        tokens: jax.Array,
        slots: jax.Array,
        key: jax.Array,
        request: SampleRequest,
    ) -> jax.Array:
        """New clips, uint8 `B F H W 3`; clip i depends on the key and `slots[i]` only. Traced under jit."""
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
    ) -> jax.Array:
        """New views of scenes, uint8 `B V F H W 3`, for tasks whose configuration `sees_views`. Traced under jit.

        Args:
          cameras: `jvgen.geometry.cameras.Cameras`, one for each frame of each view: `B V F 4` and `B V F 3 4`.
        """
        raise NotImplementedError(f"{type(self).__name__} sees one clip at a time.")

    def exported_files(self) -> dict[str, str]:
        """Further text files of an export by relative path (a scheduler's configuration, for instance)."""
        return {}

    def flops(self, bucket: BucketConfig) -> dict[str, float]:
        """Forward floating-point operations of one example, by part; the backward pass counts twice as many."""
        return {}
