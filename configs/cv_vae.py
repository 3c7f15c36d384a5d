"""CV-VAE (arXiv 2405.20279) on images and clips, from an inflated image VAE: the two published networks, and ours.

    jvgen import weights/sd21_vae --inflate --config configs/cv_vae.py:sd21 --to runs/cv_vae_sd21
    jvgen train configs/cv_vae.py:sd21 --workdir runs/cv_vae_sd21

sd21 is for Stable Diffusion 1 and 2 (z = 4) as the paper trains it, sd3 for Stable Diffusion 3 (z = 16) by the
released recipe, causal this library's network on Stable Diffusion 3's latents, which streams clips of any length and
starts as the image VAE itself.

Should reach: on WebVid's validation clips (33 frames of 256x256, every third) after 200,000 steps: sd21 PSNR 28.5,
SSIM 0.82, LPIPS 0.14, sd3 32.0, 0.90, 0.09 (tables 2 and 6), and latents that image decoders read. causal: more than
sd3 at the same compatibility; not measured at this size, at a small scale in `docs/cv_vae_tables.md`.
Chips: 16 of v5p (`v5p:2x2x4`) for sd21, 8 (`v5p:2x2x2`) for sd3, 32 (`v5p:2x4x4`) for causal; or as many GPUs of 80
GB.
Memory: sd21 11.3 to 11.8 GiB per device on v5p:2x2x4, sd3 15.6 and 15.9 on v5p:2x2x2, causal 8.9 and 18.6 on
v5p:2x4x4 (XLA's optimized programs).
Time: at least 0.2 to 0.3, 0.5 and 0.3 to 0.4 s per step (estimated from these programs, not measured).
Data: `jvgen data build images` and `jvgen data build videos`; Stable Diffusion's VAE in `weights/`; LPIPS by `jvgen
lpips`.

Differs from the released code: its KL term is summed over clips but the error is per frame (F times too heavy for
clips of F frames); its learned log-variance shares gradient clipping with the network, which starves it; LPIPS's
dropout may be active; one random frame per group is drawn for a whole batch; the adaptive weight is that of one
device's share. Here the bound is the same for images and clips, scales have their own optimizer, LPIPS is
deterministic, frames are drawn per clip, the weight is that of the whole batch. What the paper does not say for sd21
(Adam's beta2, the discriminator's learning rate) is that of the released config of sd3. All differences:
`docs/recipes.md`. For sd3 also: clips are cropped before they are resized; the released cosine
rises again after 60,000 steps, and its Adam has an epsilon of 1e-4, as large as its clipped gradients. As there, sd21
and sd3 update generator and discriminator in alternate steps.
"""

from typing import Literal

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

Variant = Literal["sd21", "sd3", "causal"]
STRIDES = (1, 2, 3, 4, 5, 6, 7, 8)


def experiment(variant: Variant = "sd21") -> Experiment:
    image = (ImageVAEConfig.sd21() if variant == "sd21" else ImageVAEConfig.sd3()).replace(remat=Remat.FULL)
    adam = OptimizerConfig(learning_rate=1e-4, warmup_steps=1000, schedule="cosine", beta2=0.98, weight_decay=0.01)
    discriminator_rate, adversarial = 5e-5, AdversarialConfig(update_schedule="alternate", limit_of="sum")
    # 3 GiB of state fit on each device; sharded, convolutions would wait for the parts of their kernels.
    mesh, sharding = MeshConfig(data=-1, fsdp=1), ShardingConfig()
    if variant == "sd21":
        network = CVVAEConfig.sd21()
    elif variant == "sd3":
        network = CVVAEConfig.sd3()
        adam, discriminator_rate = adam.replace(learning_rate=4e-5, final_fraction=0.005), 2e-5
    else:
        # Motion between the frames of two latents starts as a blend of them, not as a copy of the later one.
        network = CVVAEConfig.causal(image).replace(blend_frames=True)
        adam = adam.replace(warmup_steps=2000)
        # Late: until then reconstruction alone leads from copied frames to motion.
        adversarial = AdversarialConfig(start=50_000, limit_of="sum")
        # One clip over two chips, by rows.
        mesh, sharding = mesh.replace(seq=2), ShardingConfig(compute=dict(SPATIAL_SHARDING))
    return Experiment(
        name=f"cv_vae_{variant}",
        task=VideoVAETaskConfig(
            network=network.replace(remat=Remat.FULL),
            image_vae=image,
            image_vae_weights="weights/sd21_vae" if variant == "sd21" else "weights/sd3_vae",
            shared=SharedLatentsConfig(decoder_weight=1.0, mapping="random"),
            perceptual=PerceptualConfig(kind="lpips", weights="weights/lpips_vgg.safetensors"),
            adversarial=adversarial,
        ),
        data=DataConfig(
            sources=(SourceConfig(path="data/images"), SourceConfig(path="data/videos")),
            evaluation_sources=(SourceConfig(path="data/videos", split="validation"),),
            buckets=buckets(variant),
            threads=16,
        ),
        optimizer=adam,
        optimizers={
            "scales": OptimizerConfig(learning_rate=1e-3, clip_norm=None, weight_decay=0.0),
            "discriminator": adam.replace(learning_rate=discriminator_rate, schedule="constant", final_fraction=0.0),
        },
        training=TrainingConfig(steps=200_000, evaluate_every=5000, visualize_every=5000, log_every=50),
        ema=EmaConfig(decays=(0.9999,), parameters="vae/"),
        checkpoint=CheckpointConfig(every=2500, keep_last=2, keep_every=25_000),
        mesh=mesh,
        sharding=sharding,
    )


def buckets(variant: Variant) -> tuple[BucketConfig, ...]:
    """Batches of clips (frames, side, clips per batch, weight) and of images (side, images per batch, weight)."""
    clips, images = {
        # The paper's shares, and its batches per GPU times 16.
        "sd21": ([(9, 256, 16, 0.25), (17, 192, 16, 0.25)], [(256, 128, 0.4), (512, 32, 0.1)]),
        "sd3": ([(17, 256, 8, 0.5)], [(320, 64, 0.5)]),
        "causal": ([(33, 256, 16, 0.6)], [(512, 64, 0.4)]),
    }[variant]
    return (
        *(
            BucketConfig(
                frames=frames,
                height=side,
                width=side,
                batch_size=batch,
                strides=(1, 2, 3, 4, 5, 6, 7, 8),
                weight=weight,
            )
            for frames, side, batch, weight in clips
        ),
        *(
            BucketConfig(frames=1, height=side, width=side, batch_size=batch, kinds=("image",), weight=weight)
            for side, batch, weight in images
        ),
    )
