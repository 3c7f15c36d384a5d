"""CV-VAE for Stable Diffusion 3 (z = 16) by the recipe that was released: half images, half clips of 17 frames.

Should reach: PSNR 32.0, SSIM 0.90, LPIPS 0.09 on WebVid's validation clips (33 frames of 256x256, every third) after
200,000 steps (arXiv 2405.20279, table 2). Chips: 8 (v5p:2x2x2, or 8 GPUs of 80 GB). Data: images and clips as jvgen
data sets; Stable Diffusion 3's VAE and LPIPS (`jvgen lpips`) as local files. Begin with `jvgen import weights/sd3_vae
--inflate --config configs/cv_vae_sd3.py --to runs/cv_vae_sd3`. The network's borders are not Stable Diffusion's, so it
does not begin as that image VAE; `configs/cv_vae_causal.py` does.

Not as in the released code, beside what `configs/cv_vae_sd21.py` lists: its cosine rises again after 60,000 steps, as
nothing holds it at its end; its Adam has an epsilon of 1e-4, as large as its clipped gradients. As there, each player
acts in every other step, and schedules are in steps of the run.
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

ADAM = OptimizerConfig(
    learning_rate=4e-5, warmup_steps=1000, schedule="cosine", final_fraction=0.005, beta2=0.98, weight_decay=0.01
)


def experiment() -> Experiment:
    return Experiment(
        name="cv_vae_sd3",
        task=VideoVAETaskConfig(
            network=CVVAEConfig.sd3().replace(remat=Remat.FULL),
            image_vae=ImageVAEConfig.sd3().replace(remat=Remat.FULL),
            image_vae_weights="weights/sd3_vae",
            shared=SharedLatentsConfig(decoder_weight=1.0, mapping="random"),
            perceptual=PerceptualConfig(kind="lpips", weights="weights/lpips_vgg.safetensors"),
            adversarial=AdversarialConfig(update_schedule="alternate"),
        ),
        data=DataConfig(
            sources=(SourceConfig(path="data/images"), SourceConfig(path="data/videos")),
            evaluation_sources=(SourceConfig(path="data/videos", split="validation"),),
            buckets=(
                BucketConfig(
                    frames=17, height=256, width=256, batch_size=8, strides=(1, 2, 3, 4, 5, 6, 7, 8), weight=0.5
                ),
                BucketConfig(frames=1, height=320, width=320, batch_size=64, kinds=("image",), weight=0.5),
            ),
            threads=16,
        ),
        optimizer=ADAM,
        optimizers={
            "scales": OptimizerConfig(learning_rate=1e-3, clip_norm=None, weight_decay=0.0),
            "discriminator": ADAM.replace(learning_rate=2e-5, schedule="constant", final_fraction=0.0),
        },
        training=TrainingConfig(steps=200_000, evaluate_every=5000, visualize_every=5000, log_every=50),
        ema=EmaConfig(decays=(0.9999,), parameters="vae/"),
        checkpoint=CheckpointConfig(every=2500, keep_last=2, keep_every=25_000),
        # 3 GiB of state fit on each device; split, convolutions would wait for the parts of their kernels.
        mesh=MeshConfig(data=-1, fsdp=1),
    )
