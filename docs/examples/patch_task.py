"""A task of one's own: which arrays an example has, and the loss. The loop, resume and evaluation are those of all."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from patch_network import PatchConfig, PatchNetwork

from jvgen.data.stream.config import BucketConfig
from jvgen.nn.network import Network, Parameters
from jvgen.parallel import axes
from jvgen.tasks.pixels import from_uint8
from jvgen.tasks.task import ArraySpec, Batch, Metrics, Task, TaskConfig, activation_dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchTaskConfig(TaskConfig):
    """Reconstruct frames through a bottleneck.

    Attributes:
      network: the network that is trained.
    """

    network: PatchConfig = PatchConfig()

    def check_bucket(self, bucket: BucketConfig) -> None:
        if bucket.height % self.network.patch or bucket.width % self.network.patch:
            raise ValueError(f"{bucket.height}x{bucket.width}: not a multiple of task.network.patch.")

    def build(self) -> "PatchTask":
        return PatchTask(self)


class PatchTask(Task):
    """See `PatchTaskConfig`. Trains "patches"."""

    def __init__(self, config: PatchTaskConfig):
        self.networks = {"patches": Network.of(lambda rngs: PatchNetwork(config.network, rngs=rngs))}
        self.network_configs = {"patches": config.network}
        self.frozen_networks = {}

    def fields(self, bucket: BucketConfig) -> dict[str, ArraySpec]:
        names = (axes.FRAMES, axes.HEIGHT, axes.WIDTH, None)
        return {"video": ArraySpec((bucket.frames, bucket.height, bucket.width, 3), np.dtype(np.uint8), names)}

    def preprocess(self, example: dict[str, Any]) -> dict[str, np.ndarray]:
        return {"video": example["video"]}  # uint8 until it is on the devices

    def loss(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        frames = from_uint8(batch["video"], activation_dtype(parameters["patches"]))
        frames = frames.reshape(-1, *frames.shape[2:])
        decoded = self.networks["patches"].apply(parameters["patches"], frames)
        error = jnp.mean(jnp.square(decoded.astype(jnp.float32) - frames.astype(jnp.float32)))
        return error, {"rmse": jnp.sqrt(error)}

    def flops(self, bucket: BucketConfig) -> dict[str, float]:
        pixels = bucket.frames * bucket.height * bucket.width * 3
        return {"patches": 4.0 * pixels * self.networks["patches"].shapes["encode"]["kernel"].shape[1]}
