"""CV-VAE for Stable Diffusion 1 and 2 (z = 4) as its paper trains it: from an inflated image VAE, on images and clips.

Should reach: PSNR 28.5, SSIM 0.82, LPIPS 0.14 on WebVid's validation clips (33 frames of 256x256, every third) after
200,000 steps, and image decoders that read its latents (arXiv 2405.20279, tables 2 and 6). Chips: 16 (v5p:2x2x4, or 16
GPUs of 80 GB). Data: images and clips as jvgen data sets; Stable Diffusion 2.1's VAE and LPIPS (`jvgen lpips`) as local
files. Begin with `jvgen import weights/sd21_vae --inflate --config configs/cv_vae_sd21.py --to runs/cv_vae_sd21`.

Not as in the released code: its KL is added up over clips against a frame's error (F times too heavy for clips of F
frames); its learned log-variance shares the clipping of gradients with the network, which it starves; LPIPS's dropout
may be on; one random frame a group is drawn for a whole batch; the adaptive weight is of one device's share. Here the
bound is the same for images and clips, scales have an optimizer of their own, LPIPS is deterministic, frames are drawn
clip by clip, and the weight is of the whole batch.
"""

from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.losses.perceptual import PerceptualConfig
from jvgen.models.cv_vae.config import CVVAEConfig
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.nn.stacked import Remat
from jvgen.parallel.mesh import MeshConfig
from jvgen.tasks.adversarial import AdversarialConfig
from jvgen.tasks.video_vae import SharedLatentsConfig, VideoVAETaskConfig
from jvgen.training.config import CheckpointConfig, TrainingConfig
from jvgen.training.experiment import Experiment
from jvgen.training.optimization.ema import EmaConfig
from jvgen.training.optimization.optimizer import OptimizerConfig

STRIDES = (1, 2, 3, 4, 5, 6, 7, 8)
ADAM = OptimizerConfig(learning_rate=1e-4, warmup_steps=1000, schedule="cosine", beta2=0.98, weight_decay=0.01)


def experiment() -> Experiment:
    return Experiment(
        name="cv_vae_sd21",
        task=VideoVAETaskConfig(
            network=CVVAEConfig.sd21().replace(remat=Remat.FULL),
            image_vae=ImageVAEConfig.sd21().replace(remat=Remat.FULL),
            image_vae_weights="weights/sd21_vae",
            shared=SharedLatentsConfig(decoder_weight=1.0, mapping="random"),
            perceptual=PerceptualConfig(kind="lpips", weights="weights/lpips_vgg.safetensors"),
            adversarial=AdversarialConfig(update_schedule="alternate"),
        ),
        data=DataConfig(
            sources=(SourceConfig(path="data/images"), SourceConfig(path="data/videos")),
            evaluation_sources=(SourceConfig(path="data/videos", split="validation"),),
            buckets=(
                # The paper's shares, and its batches a GPU times 16.
                BucketConfig(frames=9, height=256, width=256, batch_size=16, strides=STRIDES, weight=0.25),
                BucketConfig(frames=17, height=192, width=192, batch_size=16, strides=STRIDES, weight=0.25),
                BucketConfig(frames=1, height=256, width=256, batch_size=128, kinds=("image",), weight=0.4),
                BucketConfig(frames=1, height=512, width=512, batch_size=32, kinds=("image",), weight=0.1),
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
        # 3 GiB of state fit on each device; split, convolutions would wait for the parts of their kernels.
        mesh=MeshConfig(data=-1, fsdp=1),
    )
