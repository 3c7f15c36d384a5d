"""iVideoGPT's tokenizer of 64x64 frames, pretrained on Open X-Embodiment and Something-Something v2 (arXiv 2405.15223).

Should reach: the released tokenizer, which took 17 GPU days on four A100s; here v5e-16 or 4 GPUs of 24 GB. Data: one
data set per entry of `jvgen.data.stream.oxe_mix` (`jvgen data build robot-episodes`), and Something-Something clips
at 64x64;
LPIPS weights as a safetensors file (`jvgen lpips`).

Steps are updates: the released script counts twice as many, every other one of which does nothing while its
discriminator is off. Not taken over from it: frames of Something-Something are augmented too, and validation is not.
For the goal-conditioned model train on with two random frames as context, 275,000 updates: `--set
data.buckets.0.segment.choice=shuffled --set data.buckets.0.segment.context=0`.
"""

from jvgen.data.stream.augment import AugmentationConfig
from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.data.stream.oxe_mix import sources
from jvgen.data.stream.segments import SegmentConfig
from jvgen.losses.perceptual import PerceptualConfig
from jvgen.models.ivideogpt.config import CompressiveTokenizerConfig
from jvgen.tasks.video_tokenizer import VideoTokenizerConfig
from jvgen.training.config import CheckpointConfig, TrainingConfig
from jvgen.training.experiment import Experiment
from jvgen.training.optimization.optimizer import OptimizerConfig


def experiment() -> Experiment:
    return Experiment(
        name="ivideogpt_tokenizer_oxe_64",
        task=VideoTokenizerConfig(
            network=CompressiveTokenizerConfig.released_64(),
            perceptual=PerceptualConfig(kind="lpips", weights="weights/lpips_vgg.safetensors"),
        ),
        data=DataConfig(
            sources=sources("data/oxe", something="data/something"),
            evaluation_sources=(SourceConfig(path="data/oxe/bridge", split="validation", frame_stride=2),),
            buckets=(
                BucketConfig(
                    frames=8,
                    height=64,
                    width=64,
                    batch_size=64,
                    segment=SegmentConfig(choice="later", horizon=16, context=2),
                ),
            ),
            upscale=True,
            augmentation=AugmentationConfig(),
            threads=16,
        ),
        optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=500, beta2=0.999, weight_decay=0.0),
        training=TrainingConfig(steps=500_000, log_every=100, evaluate_every=5000, visualize_every=10_000),
        checkpoint=CheckpointConfig(every=5000, keep_last=2, keep_every=50_000),
    )
