"""The complete description of a run: what a file in `configs/` returns."""

import dataclasses
from collections.abc import Sequence

from jvgen import config, saved_config
from jvgen.config import Config, ConfigError
from jvgen.data.stream.config import DataConfig
from jvgen.data.stream.stages import check_stages
from jvgen.parallel.mesh import MeshConfig
from jvgen.parallel.rules import ShardingConfig
from jvgen.storage import Path, UnreadableFile, as_path, read_json
from jvgen.tasks.task import TaskConfig
from jvgen.training.balance import with_batch_sizes
from jvgen.training.config import CheckpointConfig, InitFromConfig, TrainingConfig
from jvgen.training.optimization.ema import EmaConfig
from jvgen.training.optimization.optimizer import OptimizerConfig
from jvgen.value_rules import Seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment(Config):
    """One run.

    Attributes:
      name: for logs and reports.
      seed: of parameters, of the order and augmentation of data, and of every draw in training.
      task: what is trained.
      data: what it is trained on.
      optimizer: of every objective that `optimizers` does not name.
      training, ema, checkpoint: the loop, EMA parameters, saving.
      init_from: another run to take the first parameters from.
      mesh, sharding: arrangement of the devices, and of arrays on them.
      optimizers: by objective name, for tasks with several objectives.
    """

    name: str
    task: TaskConfig
    data: DataConfig
    training: TrainingConfig
    seed: Seed = 0
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EmaConfig = EmaConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    init_from: InitFromConfig = InitFromConfig()
    mesh: MeshConfig = MeshConfig()
    sharding: ShardingConfig = dataclasses.field(default_factory=ShardingConfig)
    optimizers: dict[str, OptimizerConfig] = dataclasses.field(default_factory=dict)

    def validate(self) -> None:
        for number, bucket in enumerate(self.data.buckets):
            try:
                self.task.check_bucket(bucket)
            except ValueError as error:
                raise ValueError(f"data.buckets.{number}: {error}") from error
            if self.data.tokens_per_step is None and bucket.batch_size % self.training.accumulation:
                raise ValueError(
                    f"data.buckets {bucket.name}: batch_size = {bucket.batch_size} is not a multiple of "
                    f"training.accumulation = {self.training.accumulation}; change one of them."
                )
        try:
            check_stages(self.data.buckets, self.training.steps)
        except ValueError as error:
            raise ValueError(f"data: {error}") from error
        evaluates = self.training.evaluate_every or self.training.visualize_every
        if evaluates and not self.data.evaluation_sources:
            raise ValueError(
                "training.evaluate_every or visualize_every is set, but data.evaluation_sources is empty: name a "
                "held-out data set there, or set both to 0."
            )
        best = self.checkpoint.best_metric
        every = self.training.evaluate_every
        if best is not None and (not every or self.checkpoint.every % every):
            raise ValueError(
                f"checkpoint.best_metric = {best!r}: checkpoint.every = {self.checkpoint.every} must be a multiple of "
                f"training.evaluate_every = {every}, so that every saved step has been evaluated."
            )


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment, apply overrides and validate it.

    Args:
      path: a config file (Python, with a function `experiment()`), or the `config.json` of a run directory.
      overrides: assignments such as `"optimizer.learning_rate=3e-4"`.

    Raises:
      ConfigError: no such file, not an experiment, an unknown field, or a value that does not fit.
    """
    path = as_path(path)
    experiment = _read_json(path) if path.suffix == ".json" and path.is_file() else config.load(path)
    if not isinstance(experiment, Experiment):
        raise ConfigError(f"{path}: holds {type(experiment).__name__}, not an Experiment.")
    experiment = config.override(experiment, overrides)
    config.validate_tree(experiment)
    return with_batch_sizes(experiment)


def _read_json(path: Path) -> object:
    try:
        document = read_json(path)
    except UnreadableFile as error:
        raise ConfigError(f"not a saved config: {error}") from error
    try:
        return saved_config.decode(document.get("experiment", document) if isinstance(document, dict) else document)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
