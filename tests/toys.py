"""Tiny tasks and a loader without files, for tests of the training loop; also a script that trains one of them."""

import argparse
import dataclasses
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jvgen import config, exit_codes
from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.data.stream.loader import LoadedBatch
from jvgen.nn.linear import Linear
from jvgen.nn.network import Network
from jvgen.nn.norm import RMSNorm
from jvgen.nn.stacked import Stacked
from jvgen.parallel import failing, processes
from jvgen.parallel.axes import BATCH, EMBED, LENGTH, MLP, constrain
from jvgen.parallel.mesh import MeshConfig
from jvgen.parallel.rules import ShardingConfig
from jvgen.tasks.task import ArraySpec, Mean, Objective, Task, TaskConfig
from jvgen.training.checkpoint import reader
from jvgen.training.config import CheckpointConfig, PrecisionConfig, TrainingConfig
from jvgen.training.experiment import Experiment
from jvgen.training.optimization import parameter_paths
from jvgen.training.optimization.ema import EmaConfig
from jvgen.training.optimization.optimizer import OptimizerConfig
from jvgen.training.telemetry.json_lines import read_rows

# What differs between the rows of metrics.jsonl of two runs of the same thing.
TIMES = {
    "seconds", "data_wait", "frames_per_second", "mfu", "save_stall", "host_rss_mib", "storage_retries",
}  # fmt: skip


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl without what depends on the clock or the machine."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(folder / "metrics.jsonl")]


class Layer(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.norm = RMSNorm(width, epsilon=1e-6, axis=EMBED)
        wide = nnx.initializers.normal(0.3)
        self.up = Linear(width, 2 * width, axes=(EMBED, MLP), bias=False, kernel_init=wide, rngs=rngs)
        self.down = Linear(2 * width, width, axes=(MLP, EMBED), bias=False, kernel_init=wide, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return constrain(x + self.down(jax.nn.gelu(self.up(self.norm(x)))), BATCH, LENGTH, None)


class Mlp(nnx.Module):
    """B L W -> B L W."""

    def __init__(self, width: int, layers: int, *, rngs: nnx.Rngs):
        self.blocks = Stacked(lambda r: Layer(width, rngs=r), layers, rngs=rngs)
        self.out = Linear(width, width, axes=(EMBED, EMBED), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(self.blocks.scan(lambda layer, carry, _: layer(carry), x))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig(TaskConfig):
    """Denoise vectors with a residual network.

    Attributes:
      poison: record number (first value of an example) whose loss is NaN; -1 for none.
    """

    width: int = 16
    layers: int = 2
    poison: int = -1
    frozen: bool = False

    def build(self) -> "ToyTask":
        return ToyTask(self)


class ToyTask(Task):
    def __init__(self, config: ToyConfig):
        self.config = config
        self.networks = {"model": Network.of(lambda rngs: Mlp(config.width, config.layers, rngs=rngs))}
        self.network_configs = {}
        self.frozen_networks = {}
        if config.frozen:
            self.frozen_networks = {
                "encoder": Network.of(lambda rngs: Linear(config.width, config.width, axes=(EMBED, MLP), rngs=rngs))
            }

    def load_frozen(self) -> Any:
        if not self.frozen_networks:
            return {}
        width = self.config.width
        return {"encoder": {"kernel": np.eye(width, dtype=np.float32), "bias": np.zeros(width, np.float32)}}

    def fields(self, bucket: BucketConfig) -> dict[str, ArraySpec]:
        return {
            "x": ArraySpec((bucket.frames, self.config.width), np.dtype(np.float32), (None, None)),
            "record": ArraySpec((), np.dtype(np.int32), ()),
        }

    def preprocess(self, example: dict[str, Any]) -> dict[str, np.ndarray]:
        return example

    def loss(self, parameters, frozen, batch, key):
        x = batch["x"]
        noise = jax.vmap(lambda slot, v: jax.random.normal(jax.random.fold_in(key, slot), v.shape))(batch["slot"], x)
        inputs = (x + 0.3 * noise).astype(parameters["model"]["out"]["kernel"].dtype)
        if frozen:
            inputs = self.frozen_networks["encoder"].apply(frozen["encoder"], inputs)
        prediction = self.networks["model"].apply(parameters["model"], inputs).astype(jnp.float32)
        errors = jnp.mean(jnp.square(prediction - x), axis=(1, 2))
        errors = jnp.where(batch["record"] == self.config.poison, jnp.nan, errors)
        high = (x[:, 0, 0] > 0).astype(jnp.float32)
        return jnp.mean(errors), {
            "high": Mean(jnp.sum(errors * high), jnp.sum(high)),
            "input": jnp.mean(x),
        }

    def visualize(self, parameters, frozen, batch, key):
        pixels = jnp.broadcast_to(batch["x"][:, :, None, :, None], (*batch["x"].shape[:2], 16, self.config.width, 3))
        return {"input": jnp.clip(pixels * 64 + 128, 0, 255).astype(jnp.uint8)}

    def flops(self, bucket: BucketConfig) -> dict[str, float]:
        return {"model": float(bucket.frames * (4 * self.config.layers + 1) * 2 * self.config.width**2)}


class Vector(nnx.Module):
    def __init__(self, start: float):
        self.value = nnx.Param(jnp.full((1,), start), logical_axes=(None,))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GameConfig(TaskConfig):
    """Two objectives on the saddle x * y, with different gradients."""

    def build(self) -> "GameTask":
        return GameTask()


class GameTask(ToyTask):
    def __init__(self):
        super().__init__(ToyConfig())
        self.networks = {
            "generator": Network.of(lambda rngs: Vector(1.0)),
            "critic": Network.of(lambda rngs: Vector(2.0)),
        }

    def objectives(self):
        return (
            Objective("generator", "generator/", lambda p, f, b, k: (self._product(p), {"own": jnp.float32(1)})),
            Objective("critic", "critic/", lambda p, f, b, k: (-self._product(p), {})),
        )

    def loss(self, parameters, frozen, batch, key):
        return self._product(parameters), {}

    @staticmethod
    def _product(parameters):
        return (parameters["generator"]["value"] * parameters["critic"]["value"])[0]


class FakeLoader:
    """The interface of `jvgen.data.stream.loader.Loader` over numbers made from (seed, step, slot)."""

    def __init__(
        self,
        data,
        *,
        seed,
        preprocess,
        rows=None,
        evaluation=False,
        quarantine_log=None,
        delay=0.0,
    ):
        self.data, self.seed, self.delay = data, seed, delay
        self.slots = rows or (lambda bucket: np.arange(bucket.batch_size))
        self.stream = 10**6 if evaluation else 0

    width = 16

    @property
    def buckets(self):
        return self.data.buckets

    def bucket(self, step: int) -> BucketConfig:
        return self.data.buckets[step % len(self.data.buckets)]

    def state(self, step: int) -> dict[str, Any]:
        return {"step": step, "manifest": self.data.sources[0].path, "plan": str(self.seed)}

    def check_state(self, saved: dict[str, Any]) -> None:
        if saved["manifest"] != self.data.sources[0].path:
            raise ValueError("data.sources: hold other records")

    def resume(self, saved: dict[str, Any]) -> None:
        pass

    def batches(self, start: int, stop: int | None = None) -> "FakeBatches":
        return FakeBatches(self, start, stop)

    def at(self, step: int) -> LoadedBatch:
        bucket = self.bucket(step)
        slots = self.slots(bucket)
        rows = [step * bucket.batch_size + slot for slot in slots.tolist()]
        draws = [np.random.default_rng([self.seed, self.stream, row]) for row in rows]
        x = np.stack([rng.standard_normal((bucket.frames, self.width), np.float32) for rng in draws])
        if self.delay:
            time.sleep(self.delay)
        ids = tuple(f"record-{row}" for row in rows)
        return LoadedBatch(step, bucket, {"x": x, "record": np.array(rows, np.int32)}, ids, 0.0, slots=slots)

    def record_ids(self, step: int) -> tuple[str, ...]:
        size = self.bucket(step).batch_size
        return tuple(f"record-{row}" for row in range(step * size, (step + 1) * size))


class FakeBatches(Iterator):
    def __init__(self, loader: FakeLoader, start: int, stop: int | None):
        self.loader, self.step, self.stop = loader, start, stop

    def __next__(self) -> LoadedBatch:
        if self.step == self.stop:
            raise StopIteration
        self.step += 1
        return self.loader.at(self.step - 1)

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        pass


def experiment(**changes: Any) -> Experiment:
    """A run of 20 steps on two batch shapes that divide over any mesh; changes are dotted overrides."""
    base = Experiment(
        name="toy",
        task=ToyConfig(),
        data=DataConfig(
            sources=(SourceConfig(path="nowhere"),),
            evaluation_sources=(SourceConfig(path="nowhere"),),
            buckets=(
                BucketConfig(frames=4, height=1, width=1, batch_size=16),
                BucketConfig(frames=2, height=1, width=1, batch_size=32),
            ),
        ),
        training=TrainingConfig(
            steps=20,
            precision=PrecisionConfig(compute_dtype="float32"),
            log_every=5,
            tensorboard=False,
            spike_warmup=5,
            hang_seconds=0.0,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        ema=EmaConfig(decays=(0.9,)),
        checkpoint=CheckpointConfig(every=5),
        mesh=MeshConfig(),
        sharding=ShardingConfig(replicate_below=0),
    )
    return config.override(base, [f"{path}={value}" for path, value in changes.items()])


class FailingLoader(FakeLoader):
    """Raises an exception instead of giving the training batch of one step."""

    def __init__(self, *args: Any, error: Exception, step: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.error, self.step = error, step

    def at(self, step: int) -> LoadedBatch:
        if step == self.step and bool(self.stream) == (self.error is ERRORS["evaluation"]):
            raise self.error
        return super().at(step)


ERRORS = {
    "bug": RuntimeError("a bug"),
    "passing": OSError(5, "Input/output error"),
    "full": OSError(28, "disk is full"),
    "evaluation": RuntimeError("a bug in the evaluation"),
}


def assert_equal(ours: Any, theirs: Any) -> None:
    """Two trees of the same arrays, bit for bit; NaN equals NaN."""
    for name, (a, b) in {
        k: (a, b) for (k, a), b in zip(parameter_paths.name_leaves(ours).items(), jax.tree.leaves(theirs), strict=True)
    }.items():
        assert np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True), name


def failing_once(handler: type) -> type:
    """A handler of Orbax that cannot read the first arrays that it is asked for."""

    class Failing(handler):
        failed = False

        def restore(self, *args: Any, **kwargs: Any) -> Any:
            if not Failing.failed:
                Failing.failed = True
                raise ValueError("damaged")
            return super().restore(*args, **kwargs)

    return Failing


def main() -> int:
    """Train the toy as `jvgen train` does: `toys.py WORKDIR [--delay SECONDS] [--set PATH=VALUE] [--process I ...]`."""
    from jvgen.training.preemption import Preemption

    parser = argparse.ArgumentParser()
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--fail", nargs=2, metavar=("ERROR", "STEP"))
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--port", type=int, default=0)
    parsed = parser.parse_args()

    def loader(*args: Any, **kwargs: Any) -> FakeLoader:
        if parsed.fail is None or parsed.fail[0] == "read":
            return FakeLoader(*args, **kwargs, delay=parsed.delay)
        error, step = ERRORS[parsed.fail[0]], int(parsed.fail[1])
        return FailingLoader(*args, **kwargs, delay=parsed.delay, error=error, step=step)

    if parsed.fail is not None and parsed.fail[0] == "read":
        reader.ocp.PyTreeCheckpointHandler = failing_once(reader.ocp.PyTreeCheckpointHandler)
    with Preemption(leave=True) as preemption, failing.fail_fast(parsed.workdir):
        if parsed.processes > 1:
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
            processes.initialize(f"127.0.0.1:{parsed.port}", parsed.processes, parsed.process)
        from jvgen.training.loop import train

        run = config.override(experiment(), parsed.set)
        return train(run, parsed.workdir, make_loader=loader, preemption=preemption)


if __name__ == "__main__":
    # Configs saved by this script then name a module that tests can import.
    sys.modules["toys"] = sys.modules["__main__"]
    for cls in (ToyConfig, GameConfig):
        cls.__module__ = "toys"
    try:
        sys.exit(main())
    except Exception as error:
        traceback.print_exception(error)
        sys.exit(exit_codes.of_error(error))
