"""A small world model of the embedded scenes: a body that is pushed to a goal by actions, on a CPU.

Should reach: predicted frames closer to the true ones than the last frame is, and rewards; see the experiment.
Chips: a CPU with 2 cores.
Memory: not measured.
Time: minutes for the whole run (estimated from the experiment).
Data: as `demo_ivideogpt_tokenizer.py`, whose export it reads. Run by `python -m tests.experiments.ivideogpt_metaworld`.
"""

from pathlib import Path

from jvgen import config
from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.models.ivideogpt.config import FrameTransformerConfig
from jvgen.models.ivideogpt.sampling import SamplingConfig
from jvgen.tasks.world_model import WorldModelConfig
from jvgen.training.config import CheckpointConfig, PrecisionConfig, TrainingConfig
from jvgen.training.experiment import Experiment
from jvgen.training.optimization.optimizer import OptimizerConfig

SCENES = "runs/world/scenes"


def experiment() -> Experiment:
    return Experiment(
        name="demo_ivideogpt_transformer",
        task=WorldModelConfig(
            transformer=FrameTransformerConfig(
                vocabulary=1026, width=128, layers=4, heads=4, hidden=384, max_positions=256, action_width=2,
                reward=True, attention_dropout=0.0,
            ),
            tokenizer=config.load(Path(__file__).with_name("demo_ivideogpt_tokenizer.py")).task.network,
            tokenizer_weights="runs/world/export/scenes_tokenizer/tokenizer",
            sampling=SamplingConfig(greedy=True),
        ),
        data=DataConfig(
            sources=(SourceConfig(path=SCENES),),
            evaluation_sources=(SourceConfig(path=SCENES, split="validation"),),
            buckets=(BucketConfig(frames=8, height=32, width=32, batch_size=8),),
            threads=2,
        ),
        optimizer=OptimizerConfig(
            kind="muon", learning_rate=4e-3, warmup_steps=20, schedule="cosine", weight_decay=0.01,
            muon_exclude=(".*/(action|reward)/kernel",),
        ),
        training=TrainingConfig(steps=300, precision=PrecisionConfig(compute_dtype="float32"), log_every=50),
        checkpoint=CheckpointConfig(every=200, keep_last=2),
    )  # fmt: skip
