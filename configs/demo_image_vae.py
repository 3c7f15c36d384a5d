"""The demo's image VAE: 32x32 frames of the embedded scenes, 4x4 pixels per latent of 4 channels, on a CPU.

Should reach: PSNR 30.3 dB on held-out frames.
Chips: a CPU with 2 cores.
Memory: 1.8 GiB resident at most, with everything else of the process (measured).
Time: 0.5 s per step, 3 minutes for the run with its restart (measured on two slow cores).
Data: `jvgen data build scenes --out runs/demo/scenes`. Run by `make demo`.
"""

from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.losses.perceptual import PerceptualConfig
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.tasks.image_vae import ImageVAETaskConfig
from jvgen.training.config import CheckpointConfig, PrecisionConfig, TrainingConfig
from jvgen.training.experiment import Experiment
from jvgen.training.optimization.ema import EmaConfig
from jvgen.training.optimization.optimizer import OptimizerConfig

SCENES = "runs/demo/scenes"


def network() -> ImageVAEConfig:
    """Small, and of the published architecture, so that it exports to diffusers' AutoencoderKL."""
    return ImageVAEConfig.tiny()


def experiment() -> Experiment:
    return Experiment(
        name="demo_image_vae",
        task=ImageVAETaskConfig(
            network=network(),
            perceptual=PerceptualConfig(kind="laplacian", levels=3),
            perceptual_weight=0.25,
            kl_weight=1e-4,
        ),
        data=DataConfig(
            sources=(SourceConfig(path=SCENES),),
            evaluation_sources=(SourceConfig(path=SCENES, split="validation"),),
            buckets=(BucketConfig(frames=1, height=32, width=32, batch_size=32),),
            threads=2,
        ),
        optimizer=OptimizerConfig(
            kind="muon", learning_rate=5e-3, warmup_steps=10, schedule="cosine", weight_decay=1e-3
        ),
        training=TrainingConfig(
            steps=260, precision=PrecisionConfig(compute_dtype="float32"), log_every=20, visualize_every=260
        ),
        ema=EmaConfig(decays=(0.98,)),
        checkpoint=CheckpointConfig(every=65, keep_last=2),
    )
