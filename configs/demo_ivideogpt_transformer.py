"""A small world model of the embedded scenes: a cube that is pushed to a goal by actions, on a CPU.

Should reach: held-out frames 1 to 8 steps ahead at 21.2 dB (17.3 by copying the last frame), moving pixels at 15.3 dB
(9.5; 10.6 with other actions), after 300 steps. Places of ids in their frame and actions at every id, which the
published models do not have, are on: without them 19.4 and 13.8 dB. See docs/planning.md.
Chips: a CPU with 2 cores.
Memory: not measured.
Time: 11 minutes on two cores with twenty other processes, ids tokenized before (measured by the experiment).
Data: as `demo_ivideogpt_tokenizer.py`, whose export it reads. Compared with other settings by
`python -m tests.experiments.world_model_ablation`.
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
                vocabulary=258, width=128, layers=4, heads=4, hidden=384, max_positions=320, action_width=2,
                reward=True, attention_dropout=0.0, tokens_per_frame=(64, 16), action_everywhere=True,
            ),
            tokenizer=config.load(Path(__file__).with_name("demo_ivideogpt_tokenizer.py")).task.network,
            tokenizer_weights="runs/world/export/scenes_tokenizer/tokenizer",
            sampling=SamplingConfig(greedy=True),
        ),
        data=DataConfig(
            sources=(SourceConfig(path=SCENES),),
            evaluation_sources=(SourceConfig(path=SCENES, split="validation"),),
            buckets=(BucketConfig(frames=10, height=32, width=32, batch_size=8),),
            threads=2,
        ),
        optimizer=OptimizerConfig(
            kind="muon", learning_rate=4e-3, warmup_steps=20, schedule="cosine", weight_decay=0.01,
            muon_exclude=(".*/(action|reward)/kernel",),
        ),
        training=TrainingConfig(steps=300, precision=PrecisionConfig(compute_dtype="float32"), log_every=50),
        checkpoint=CheckpointConfig(every=200, keep_last=2),
    )  # fmt: skip
