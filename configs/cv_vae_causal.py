"""The causal CV-VAE on Stable Diffusion 3's latents: streams clips of any length, and begins as the image VAE itself.

Should reach: more than `configs/cv_vae_sd3.py` (PSNR 32.0 on WebVid's validation clips) at the same compatibility: it
has as many parameters, starts from exact images and latents instead of shifted ones, with what lies between two latents
blended instead of held, and trains both players in every step. That is not measured at this size; on a small scale it
is in `docs/cv_vae_tables.md`. Chips: 32 (v5p:2x4x4, or 32 GPUs of 80 GB). Data: images and clips as jvgen data
sets; Stable Diffusion 3's VAE and LPIPS (`jvgen lpips`) as local files. Begin with `jvgen import weights/sd3_vae
--inflate --config configs/cv_vae_causal.py --to runs/cv_vae_causal`.
"""

from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.losses.perceptual import PerceptualConfig
from jvgen.models.cv_vae.config import CVVAEConfig
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.nn.stacked import Remat
from jvgen.parallel.mesh import MeshConfig
from jvgen.parallel.rules import SPATIAL_SHARDING, ShardingConfig
from jvgen.tasks.adversarial import AdversarialConfig
from jvgen.tasks.video_vae import SharedLatentsConfig, VideoVAETaskConfig
from jvgen.training.config import CheckpointConfig, TrainingConfig
from jvgen.training.experiment import Experiment
from jvgen.training.optimization.ema import EmaConfig
from jvgen.training.optimization.optimizer import OptimizerConfig

ADAM = OptimizerConfig(learning_rate=1e-4, warmup_steps=2000, schedule="cosine", beta2=0.98, weight_decay=0.01)


def experiment() -> Experiment:
    image = ImageVAEConfig.sd3().replace(remat=Remat.FULL)
    return Experiment(
        name="cv_vae_causal",
        task=VideoVAETaskConfig(
            # Motion between two latents' frames begins as a blend of theirs, not as a copy of the newer.
            network=CVVAEConfig.causal(image).replace(blend_frames=True),
            image_vae=image,
            image_vae_weights="weights/sd3_vae",
            shared=SharedLatentsConfig(decoder_weight=1.0, mapping="random"),
            perceptual=PerceptualConfig(kind="lpips", weights="weights/lpips_vgg.safetensors"),
            # Late: until then reconstruction leads the way from held frames to motion.
            adversarial=AdversarialConfig(start=50_000),
        ),
        data=DataConfig(
            sources=(SourceConfig(path="data/images"), SourceConfig(path="data/videos")),
            evaluation_sources=(SourceConfig(path="data/videos", split="validation"),),
            buckets=(
                BucketConfig(
                    frames=33, height=256, width=256, batch_size=16, strides=(1, 2, 3, 4, 5, 6, 7, 8), weight=0.6
                ),
                BucketConfig(frames=1, height=512, width=512, batch_size=64, kinds=("image",), weight=0.4),
            ),
            threads=16,
        ),
        optimizer=ADAM,
        optimizers={
            "scales": OptimizerConfig(learning_rate=1e-3, clip_norm=None, weight_decay=0.0),
            "discriminator": ADAM.replace(learning_rate=5e-5, schedule="constant"),
        },
        training=TrainingConfig(steps=200_000, evaluate_every=5000, visualize_every=5000, log_every=50),
        ema=EmaConfig(decays=(0.9999,), parameters="vae/"),
        checkpoint=CheckpointConfig(every=2500, keep_last=2, keep_every=25_000),
        # One clip over two chips, by rows. 3 GiB of state fit on each device; split, convolutions would wait for the
        # parts of their kernels.
        mesh=MeshConfig(data=-1, fsdp=1, seq=2),
        sharding=ShardingConfig(compute=dict(SPATIAL_SHARDING)),
    )
