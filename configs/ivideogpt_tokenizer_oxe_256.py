"""iVideoGPT's tokenizer of 256x256 frames, pretrained on Open X-Embodiment (arXiv 2405.15223).

Should reach: the released tokenizer (which its authors call under-trained), 16 GPU days on four A100s of 40 GB; here
v5e-32 or 8 GPUs of 40 GB. Data: as `ivideogpt_tokenizer_oxe_64.py`, frames of 256x256 or more. The published run began
with aMUSEd's image tokenizer in both halves; this one begins at random unless a checkpoint is put there.

Steps are updates, half of what the released script counts. For RoboNet at 256x256 go on from here: `--set
data.buckets.0.segment.horizon=12 --set optimizer.learning_rate=1e-4 --set training.steps=75000`; the discriminator that
the paper turns on for its last third is not there.
"""

from jvgen.data.stream.augment import AugmentationConfig
from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.data.stream.oxe_mix import sources
from jvgen.data.stream.segments import SegmentConfig
from jvgen.losses.perceptual import PerceptualConfig
from jvgen.models.ivideogpt.config import CompressiveTokenizerConfig
from jvgen.nn.stacked import Remat
from jvgen.tasks.video_tokenizer import VideoTokenizerConfig
from jvgen.training.config import CheckpointConfig, TrainingConfig
from jvgen.training.experiment import Experiment
from jvgen.training.optimization.optimizer import OptimizerConfig


def experiment() -> Experiment:
    return Experiment(
        name="ivideogpt_tokenizer_oxe_256",
        task=VideoTokenizerConfig(
            network=CompressiveTokenizerConfig.released_256().replace(remat=Remat.FULL),
            perceptual=PerceptualConfig(kind="lpips", weights="weights/lpips_vgg.safetensors"),
        ),
        data=DataConfig(
            sources=sources("data/oxe"),
            evaluation_sources=(SourceConfig(path="data/oxe/bridge", split="validation", frame_stride=2),),
            buckets=(
                BucketConfig(
                    frames=8,
                    height=256,
                    width=256,
                    batch_size=32,
                    segment=SegmentConfig(choice="later", horizon=16, context=2),
                ),
            ),
            upscale=True,
            augmentation=AugmentationConfig(),
            threads=16,
        ),
        optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=500, beta2=0.999, weight_decay=0.0),
        training=TrainingConfig(steps=125_000, log_every=100, evaluate_every=5000, visualize_every=10_000),
        checkpoint=CheckpointConfig(every=2500, keep_last=2, keep_every=25_000),
    )
