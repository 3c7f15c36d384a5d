"""Where the networks of a pipeline lie on this machine, and how one gets there from its files."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jvgen import nested
from jvgen.interop.from_torch import import_folder
from jvgen.nn import lora
from jvgen.nn.compute_dtype import compute_shapes
from jvgen.nn.network import Network, Parameters
from jvgen.parallel import axes
from jvgen.parallel.mesh import SEQ, MeshConfig, make_mesh
from jvgen.parallel.rules import Sharding
from jvgen.storage import Path


@dataclasses.dataclass(frozen=True)
class Placement:
    """Devices and the dtype that networks compute in on them.

    Attributes:
      sharding: clips are split over `fsdp`, the tokens of a clip over `seq`.
      dtype: of matrices and kernels; vectors are float32.
    """

    sharding: Sharding
    dtype: jnp.dtype

    @classmethod
    def of(cls, batch: int, dtype: jnp.dtype, devices: Sequence[jax.Device] | None = None) -> "Placement":
        """All devices of this machine (or those given) for batches of `batch` clips.

        Each clip gets as many devices as there are for one: batches are split first, then the tokens of a clip.
        """
        devices = jax.local_devices() if devices is None else devices
        clips = math.gcd(batch, len(devices))
        return cls(Sharding(make_mesh(MeshConfig(fsdp=clips, seq=-1), devices)), jnp.dtype(dtype))

    @property
    def devices_a_clip(self) -> int:
        """Over how many devices the tokens of a clip are split: what their number should be a multiple of."""
        return self.sharding.mesh.shape[SEQ]

    def load(self, folder: str | Path) -> Parameters:
        """A network's parameters on the devices; one stack of layers at a time is in the host's memory.

        Raises:
          ValueError, WeightError: see `jvgen.interop.from_torch.import_folder`.
        """
        places: dict[str, Any] = {}

        def shapes(network: Network) -> Parameters:
            wanted = compute_shapes(network.shapes, network.axes, self.dtype)
            places.update(nested.flatten(self.sharding.storage(network.axes, wanted)))
            return wanted

        def place(path: str, array: np.ndarray) -> jax.Array:
            # Waiting here lets go of the host's copy before the next one is made.
            return jax.block_until_ready(jax.device_put(array, places[path]))

        return import_folder(folder, shapes=shapes, place=place)[1]

    def with_adapter(
        self, name: str, folder: str | Path, adapter: Parameters | None, *, unmerged: bool
    ) -> dict[str, Parameters]:
        """A network by its name, as `load` makes it, with a LoRA merged into it, or beside it as "lora"."""
        parameters = self.load(folder)
        if adapter is None:
            return {name: parameters}
        if unmerged:
            return {name: parameters, lora.TREE: {name: self.replicate(adapter)}}
        return {name: self.merge(parameters, adapter)}

    def replicate(self, factors: Parameters) -> Parameters:
        """LoRA factors in the dtype of matrices, whole on each device."""
        return jax.tree.map(
            lambda leaf: jax.device_put(np.asarray(leaf).astype(self.dtype), self.sharding.replicated), factors
        )

    def merge(self, parameters: Parameters, factors: Parameters) -> Parameters:
        """A network's parameters with a LoRA merged into them, one stack of kernels at a time, in their place."""
        flat = nested.flatten(parameters)
        for path, pair in lora.pairs(factors).items():
            kernel = flat.pop(f"{path}/kernel")
            merged = jax.jit(lora.merged_kernel, donate_argnums=0, out_shardings=kernel.sharding)
            flat[f"{path}/kernel"] = jax.block_until_ready(merged(kernel, pair[lora.DOWN], pair[lora.UP]))
        return nested.unflatten(flat)

    def jit(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`jax.jit` of a function that is traced with activations placed by the sharding."""

        def placed(*arguments: Any) -> Any:
            with axes.partitioned(self.sharding):
                return function(*arguments)

        return jax.jit(placed)


def default_dtype() -> str:
    """What networks compute in unless something is asked for: float32 on CPUs, bfloat16 on what has it in hardware."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"
