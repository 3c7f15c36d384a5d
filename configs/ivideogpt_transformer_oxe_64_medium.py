"""iVideoGPT's medium transformer (436 million parameters) on 64x64 frames of Open X-Embodiment (arXiv 2405.15223).

Should reach: the released ivideogpt-oxe-64-act-free-medium; here v5e-32 or 8 GPUs of 40 GB. Everything else is as in
`ivideogpt_transformer_oxe_64.py`, tokenizer included.
"""

from jvgen.data.stream.augment import AugmentationConfig
from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.data.stream.oxe_mix import sources
from jvgen.models.ivideogpt.config import CompressiveTokenizerConfig, FrameTransformerConfig
from jvgen.nn.stacked import Remat
from jvgen.tasks.world_model import WorldModelConfig
from jvgen.training.config import CheckpointConfig, TrainingConfig
from jvgen.training.experiment import Experiment
from jvgen.training.optimization.optimizer import OptimizerConfig


def experiment() -> Experiment:
    return Experiment(
        name="ivideogpt_transformer_oxe_64_medium",
        task=WorldModelConfig(
            transformer=FrameTransformerConfig.medium().replace(remat=Remat.FULL),
            tokenizer=CompressiveTokenizerConfig.released_64(),
            tokenizer_weights="exported/ivideogpt_tokenizer_oxe_64/tokenizer",
        ),
        data=DataConfig(
            sources=sources("data/oxe"),
            evaluation_sources=(SourceConfig(path="data/oxe/bridge", split="validation", frame_stride=2),),
            buckets=(BucketConfig(frames=16, height=64, width=64, batch_size=64),),
            upscale=True,
            augmentation=AugmentationConfig(),
            threads=16,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-4, warmup_steps=5000, schedule="cosine", beta2=0.999, weight_decay=0.01
        ),
        training=TrainingConfig(steps=700_000, log_every=100, evaluate_every=10_000, visualize_every=10_000),
        checkpoint=CheckpointConfig(every=5000, keep_last=2, keep_every=50_000),
    )
