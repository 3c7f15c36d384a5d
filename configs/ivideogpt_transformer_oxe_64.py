"""iVideoGPT's small transformer on 64x64 frames, pretrained action-free on Open X-Embodiment (arXiv 2405.15223).

Should reach: the released ivideogpt-oxe-64-act-free, 19 GPU days on four A100s; here v5e-16 or 4 GPUs of 24 GB. An
untrained model begins at ln 16386 = 9.70; one that has learned which ids can follow at all is near ln 8193 = 9.01. Data
as for the tokenizer, without Something-Something; `jvgen export` the tokenizer first.

Not taken over from the released scripts: the learning rate falls to zero at the last step of 700,000 (theirs is still
at a fifth of its peak when the paper stops), gradients are clipped at 1.0 (as the paper says; the script of this size
does not), checkpoints are kept whatever the loss is, validation is not augmented. Goal-conditioned: `--set
task.goal=true --set training.steps=1000000`, with the tokenizer trained on random frames.
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
        name="ivideogpt_transformer_oxe_64",
        task=WorldModelConfig(
            transformer=FrameTransformerConfig.small().replace(remat=Remat.FULL),
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
