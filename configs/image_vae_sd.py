"""Stable Diffusion's image autoencoder (z = 4) from scratch at 256x256, on images and frames of clips.

Should reach: the published AutoencoderKL reports PSNR 26 on COCO at f8, z = 4; this recipe has no discriminator, so
expect a similar PSNR and softer texture.
Chips: 64 of v5e (`v5e:8x8`), 16 of v5p (`v5p:2x2x4`) or 8 GPUs of 80 GB.
Memory: 6.5 GiB per device on v5e:8x8, 20.5 on v5p:2x2x4 (XLA's optimized programs).
Time: at least 0.19 s per step on v5e:8x8, 0.31 s on v5p:2x2x4 (estimated from these programs, not measured).
Data: `jvgen data build images` and `jvgen data build videos`; LPIPS weights by `jvgen lpips`.

Differs from the released recipe, see `docs/recipes.md`: no discriminator, Adam with betas 0.9 and 0.95, learning rate
1e-4 with a cosine at batch 512 (4.5e-6 per image), frames of clips beside images, EMA.
"""

from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.losses.perceptual import PerceptualConfig
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.nn.stacked import Remat
from jvgen.parallel.mesh import MeshConfig
from jvgen.tasks.image_vae import ImageVAETaskConfig
from jvgen.training.config import CheckpointConfig, TrainingConfig
from jvgen.training.experiment import Experiment
from jvgen.training.optimization.ema import EmaConfig
from jvgen.training.optimization.optimizer import OptimizerConfig


def experiment() -> Experiment:
    return Experiment(
        name="image_vae_sd",
        task=ImageVAETaskConfig(
            network=ImageVAEConfig.sd15().replace(remat=Remat.FULL, sample_size=256),
            perceptual=PerceptualConfig(kind="lpips", weights="weights/lpips_vgg.safetensors"),
            # 1e-6 on the sum over an image's latent elements, as released; 48 pixel values per latent element.
            kl_weight=1e-6 * 32 * 32 * 4 / (256 * 256 * 3),
        ),
        data=DataConfig(
            sources=(
                SourceConfig(path="data/images", weight=1.0),
                SourceConfig(path="data/videos", weight=1.0),
            ),
            evaluation_sources=(SourceConfig(path="data/images", split="validation"),),
            buckets=(BucketConfig(frames=1, height=256, width=256, batch_size=512),),
            flip=True,
            threads=16,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=2000, schedule="cosine", weight_decay=0.0),
        training=TrainingConfig(steps=250_000, evaluate_every=5000, visualize_every=5000, log_every=50),
        ema=EmaConfig(decays=(0.999, 0.9999)),
        checkpoint=CheckpointConfig(every=2500, keep_last=2, keep_every=25_000),
        # 1.6 GiB of state fit on each device; sharded, convolutions would wait for the parts of their kernels.
        mesh=MeshConfig(data=-1, fsdp=1),
    )
