"""iVideoGPT's tokenizer finetuned on RoboNet at 64x64, or on the data of VP2 (arXiv 2405.15223, table 3).

Should reach: the released tokenizer, 8 GPU days on four A100s (VP2: 4); here v5e-8 or 4 GPUs of 24 GB. Begin with the
pretrained weights: `jvgen import exported/ivideogpt_tokenizer_oxe_64/tokenizer --config
configs/ivideogpt_tokenizer_robonet.py --to runs/robonet`. Data: `jvgen data build robot-episodes robonet --out
data/robonet`, from files of frames and actions. For VP2: `--set data.sources.0.path=data/vp2_robosuite --set
training.steps=100000`.

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
        name="ivideogpt_tokenizer_robonet",
        task=VideoTokenizerConfig(
            network=CompressiveTokenizerConfig.released_64(),
            perceptual=PerceptualConfig(kind="lpips", weights="weights/lpips_vgg.safetensors"),
        ),
        data=DataConfig(
            sources=(SourceConfig(path="data/robonet"),),
            evaluation_sources=(SourceConfig(path="data/robonet", split="validation"),),
            buckets=(
                BucketConfig(
                    frames=8,
                    height=64,
                    width=64,
                    batch_size=64,
                    segment=SegmentConfig(choice="later", horizon=12, context=2),
                ),
            ),
            upscale=True,
            augmentation=AugmentationConfig(),
            threads=16,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=500, beta2=0.999, weight_decay=0.0),
        training=TrainingConfig(steps=300_000, log_every=100, evaluate_every=5000, visualize_every=10_000),
        checkpoint=CheckpointConfig(every=5000, keep_last=2),
    )
