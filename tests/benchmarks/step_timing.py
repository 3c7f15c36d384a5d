"""The training step of one network, ours against a PyTorch module's, from the same weights on the same numbers."""

import dataclasses
import gc
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.models.weight_map import WeightMap
from jvgen.nn.network import Network, Parameters
from jvgen.parallel.mesh import single_device_mesh
from jvgen.tasks.task import ArraySpec, Batch, Metrics, Task, TaskConfig, activation_dtype
from jvgen.training.config import PrecisionConfig, TrainingConfig
from jvgen.training.experiment import Experiment
from jvgen.training.optimization.ema import EmaConfig
from jvgen.training.optimization.optimizer import OptimizerConfig
from jvgen.training.program import Program
from jvgen.training.state import TrainState
from tests.benchmarks import timing

NOTES = (
    "same weights (through the weight map), same batch, same optimizer; loss_difference is the largest relative",
    "difference of the first three losses. Ours also computes norms, health and the skip of unsound steps, as every",
    "run does. PyTorch: AdamW(fused=True), scaled_dot_product_attention. torch_first_steps: three steps,",
    "compilation included.",
)
# Columns of the table; the JSON file has the rest.
SHOWN = (
    "case", "ours_median_s", "ours_min_s", "torch_median_s", "torch_min_s", "ratio_of_medians",
    "middle_half", "ratio_of_minima", "ratio_of_processor_time", "ours_gflops", "ours_compile_s", "torch_first_steps_s",
)  # fmt: skip
LEARNING_RATE, BETAS, EPSILON, DECAY, CLIP = 1e-4, (0.9, 0.95), 1e-8, 0.01, 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedTaskConfig(TaskConfig):
    """A network and a loss on given arrays: no draws, so that PyTorch can be given the same numbers."""

    network: Callable[[], Network]
    arrays: Mapping[str, np.ndarray]
    loss: Callable[[Network, Parameters, Batch, jnp.dtype], jax.Array]

    def build(self) -> "FixedTask":
        return FixedTask(self)


class FixedTask(Task):
    """See `FixedTaskConfig`. Trains "network"."""

    def __init__(self, config: FixedTaskConfig):
        self.config = config
        self.networks = {"network": config.network()}
        self.network_configs = {}
        self.frozen_networks = {}

    def fields(self, bucket: BucketConfig) -> dict[str, ArraySpec]:
        return {
            name: ArraySpec(array.shape[1:], array.dtype, (None,) * (array.ndim - 1))
            for name, array in self.config.arrays.items()
        }

    def preprocess(self, example: dict[str, Any]) -> dict[str, np.ndarray]:
        return example

    def loss(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        dtype = activation_dtype(parameters["network"])
        return self.config.loss(self.networks["network"], parameters["network"], batch, dtype), {}


@dataclasses.dataclass(frozen=True)
class Case:
    """One size of one network.

    Attributes:
      name: for the table.
      network: makes ours.
      arrays: a batch.
      loss: (network, parameters, batch, compute dtype) -> float32 scalar.
      module: makes theirs.
      weights: our names to theirs.
      torch_loss: (module, the same arrays as tensors) -> scalar.
      flops: of a forward pass over the batch.
      dtype: both sides compute in it, over float32 parameters.
    """

    name: str
    network: Callable[[], Network]
    arrays: Mapping[str, np.ndarray]
    loss: Callable[[Network, Parameters, Batch, jnp.dtype], jax.Array]
    module: Callable[[], torch.nn.Module]
    weights: WeightMap
    torch_loss: Callable[[torch.nn.Module, dict[str, torch.Tensor]], torch.Tensor]
    flops: float
    dtype: str = "float32"

    def experiment(self, ema: tuple[float, ...] = ()) -> Experiment:
        """A run of this case; without averages unless asked for, because the other side keeps none."""
        return Experiment(
            name=self.name,
            task=FixedTaskConfig(network=self.network, arrays=self.arrays, loss=self.loss),
            data=DataConfig(sources=(SourceConfig(path="none"),), buckets=(self.bucket,)),
            optimizer=OptimizerConfig(
                learning_rate=LEARNING_RATE, warmup_steps=0, beta1=BETAS[0], beta2=BETAS[1], epsilon=EPSILON,
                weight_decay=DECAY, no_weight_decay=(), clip_norm=CLIP,
            ),
            training=TrainingConfig(steps=10**6, precision=PrecisionConfig(compute_dtype=self.dtype)),
            ema=EmaConfig(decays=ema),
        )  # fmt: skip

    @property
    def bucket(self) -> BucketConfig:
        """Only its batch size means something: the arrays are given."""
        return BucketConfig(frames=1, height=1, width=1, batch_size=len(next(iter(self.arrays.values()))))


class OurStep:
    """Our compiled training step and its state; a call makes one step."""

    def __init__(self, case: Case, ema: tuple[float, ...] = ()):
        self.program = Program.build(case.experiment(ema), single_device_mesh())
        began = time.perf_counter()
        self.compiled = self.program.lower(case.bucket).compile()
        self.compile_seconds = time.perf_counter() - began
        self.state: TrainState = self.program.init()
        self.batch = self.program.shard_batch(dict(case.arrays), case.bucket)

    def parameters(self) -> Parameters:
        """A copy on the host: the state is donated to the next step."""
        return jax.tree.map(np.array, self.state.parameters["network"])

    def __call__(self) -> float:
        self.state, metrics = self.compiled(self.state, self.batch)
        jax.block_until_ready(self.state)
        return float(metrics["loss"])


class TorchStep:
    """Their training step: forward, backward, clipping, AdamW in its fastest form; a call makes one step.

    Args:
      parameters: ours, to start from; None for the module's own.
    """

    def __init__(self, case: Case, parameters: Parameters | None, threads: int, compiled: bool = False):
        torch.set_num_threads(threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with self.device:
            self.module = case.module().train()
        if parameters is not None:
            state = {name: torch.from_numpy(np.array(array)) for name, array in case.weights.to_torch(parameters)}
            self.module.load_state_dict(state, strict=True)
        self.batch = {name: torch.from_numpy(np.array(array)).to(self.device) for name, array in case.arrays.items()}
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(), lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, weight_decay=DECAY, fused=True
        )
        self.half = case.dtype == "bfloat16"
        self.loss = case.torch_loss
        self.run = torch.compile(self.module) if compiled else self.module
        self.compile_seconds = 0.0

    def __call__(self) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            loss = self.loss(self.run, self.batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), CLIP)
        self.optimizer.step()
        # Waits for the device, as reading our loss does.
        return loss.item()


def check_equal(case: Case, ours: list[float], theirs: list[float]) -> float:
    """Largest relative difference of the losses of the first steps; after the first they show that the updates agree.

    Raises:
      AssertionError: the two sides do not do the same work.
    """
    tolerance = 2e-2 if case.dtype == "bfloat16" else 1e-4
    difference = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    assert np.isfinite(difference) and difference < tolerance, f"{case.name}: losses {ours} against {theirs}"
    return difference


def compare(case: Case, cores: int, repeats: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Time both sides of a case; returns a row and the raw seconds."""
    ours = OurStep(case)
    theirs: dict[str, TorchStep] = {"torch": TorchStep(case, ours.parameters(), cores)}
    if torch.cuda.is_available():
        theirs["torch.compile"] = TorchStep(case, ours.parameters(), cores, compiled=True)
    own = [ours() for _ in range(3)]
    difference = 0.0
    for side in theirs.values():
        began = time.perf_counter()
        first = side()
        rest = [side() for _ in range(2)]
        side.compile_seconds = time.perf_counter() - began
        difference = max(difference, check_equal(case, own, [first, *rest]))
    samples = timing.in_turns({"ours": ours, **theirs}, repeats)
    best = min(theirs, key=lambda name: samples[name].median)
    row = {
        "case": case.name,
        "ours_median_s": samples["ours"].median,
        "ours_min_s": samples["ours"].least,
        "torch_median_s": samples[best].median,
        "torch_min_s": samples[best].least,
        **timing.ratio(samples["ours"], samples[best]),
        "ours_compile_s": ours.compile_seconds,
        "torch_first_steps_s": theirs[best].compile_seconds,
        "ours_gflops": 3 * case.flops / samples["ours"].least / 1e9,
        "loss_difference": difference,
    }
    if len(theirs) > 1:
        row["torch_is"] = best
    raw = {name: dataclasses.asdict(sample) for name, sample in samples.items()}
    del ours, theirs
    gc.collect()
    return row, raw
