"""iVideoGPT's tokenizer finetuned on BAIR robot pushing: one frame of context (arXiv 2405.15223, table 3).

Should reach: the released tokenizer of its BAIR models, 2 GPU days on four A100s; here v5e-8 or 4 GPUs of 24 GB. Begin
with the pretrained weights, of whose two context frames the last is kept: `jvgen import
exported/ivideogpt_tokenizer_oxe_64/tokenizer --allow-partial --config configs/ivideogpt_tokenizer_bair.py --to
runs/bair`.
Data: `jvgen data build robot-episodes bair --camera aux1_image --out data/bair`.

Steps are updates, half of what the released script counts.
"""

from jvgen.data.stream.augment import AugmentationConfig
from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.data.stream.segments import SegmentConfig
from jvgen.losses.perceptual import PerceptualConfig
from jvgen.models.ivideogpt.config import CompressiveTokenizerConfig
from jvgen.tasks.video_tokenizer import VideoTokenizerConfig
from jvgen.training.config import CheckpointConfig, TrainingConfig
from jvgen.training.experiment import Experiment
from jvgen.training.optimization.optimizer import OptimizerConfig


def experiment() -> Experiment:
    return Experiment(
        name="ivideogpt_tokenizer_bair",
        task=VideoTokenizerConfig(
            network=CompressiveTokenizerConfig.released_64().replace(context_frames=1),
            perceptual=PerceptualConfig(kind="lpips", weights="weights/lpips_vgg.safetensors"),
        ),
        data=DataConfig(
            sources=(SourceConfig(path="data/bair"),),
            evaluation_sources=(SourceConfig(path="data/bair", split="validation"),),
            buckets=(
                BucketConfig(
                    frames=8,
                    height=64,
                    width=64,
                    batch_size=64,
                    segment=SegmentConfig(choice="later", horizon=16, context=1),
                ),
            ),
            augmentation=AugmentationConfig(),
            threads=16,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=500, beta2=0.999, weight_decay=0.0),
        training=TrainingConfig(steps=100_000, log_every=100, evaluate_every=5000, visualize_every=10_000),
        checkpoint=CheckpointConfig(every=5000, keep_last=2),
    )
