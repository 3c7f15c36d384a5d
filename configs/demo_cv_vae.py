"""A small causal CV-VAE on 64x64 clips of the embedded scenes, from an image VAE trained on them, on a CPU in minutes.

Should reach: a PSNR of 27 dB on held-out clips of 17 frames, 4x4x4 pixels a latent, with latents that the image VAE's
decoder reads as well as its own (within 1 dB). Data: `jvgen data build scenes --out runs/cv_vae/scenes --set height=64
--set width=64 --set frames=33`. Image VAE: `configs/demo_image_vae.py` trained on it at 64x64 and exported. Begin with
`jvgen import runs/cv_vae/image/vae --inflate --config configs/demo_cv_vae.py --to runs/cv_vae/video`.
"""

from jvgen.data.config import BucketConfig, DataConfig, SourceConfig
from jvgen.experiment import Experiment
from jvgen.losses.perceptual import PerceptualConfig
from jvgen.models.cv_vae.config import CVVAEConfig
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.parallel.mesh import MeshConfig
from jvgen.parallel.rules import COMPUTE_IN_SPACE, ShardingConfig
from jvgen.tasks.video_vae import SharedLatentsConfig, VideoVAETaskConfig
from jvgen.training.config import CheckpointConfig, TrainingConfig
from jvgen.training.ema import EmaConfig
from jvgen.training.optimizer import OptimizerConfig

SCENES = "runs/cv_vae/scenes"


def experiment() -> Experiment:
    return Experiment(
        name="demo_cv_vae",
        task=VideoVAETaskConfig(
            network=CVVAEConfig.causal(ImageVAEConfig.tiny()).replace(frames_between="blended"),
            image_vae=ImageVAEConfig.tiny(),
            image_vae_weights="runs/cv_vae/image/vae",
            shared=SharedLatentsConfig(decoder_weight=1.0, mapping="random"),
            perceptual=PerceptualConfig(kind="laplacian", levels=3),
            perceptual_weight=0.25,
            kl_weight=1e-4,
            learned_scales=False,
        ),
        data=DataConfig(
            sources=(SourceConfig(path=SCENES),),
            evaluation_sources=(SourceConfig(path=SCENES, split="validation"),),
            buckets=(
                BucketConfig(
                    frames=17,
                    height=64,
                    width=64,
                    batch_size=2,
                    strides=(1, 2),
                    kinds=("static", "dynamic"),
                    weight=0.7,
                ),
                BucketConfig(frames=1, height=64, width=64, batch_size=16, weight=0.3),
            ),
            threads=2,
        ),
        optimizer=OptimizerConfig(
            kind="muon", learning_rate=2e-3, warmup_steps=20, schedule="cosine", weight_decay=1e-3
        ),
        training=TrainingConfig(steps=300, compute_dtype="float32", log_every=20, evaluate_every=100),
        ema=EmaConfig(decays=(0.98,), parameters="vae/"),
        checkpoint=CheckpointConfig(every=100, keep_last=2),
        # Two clips do not divide over many devices; their rows do.
        mesh=MeshConfig(fsdp=1, seq=-1),
        sharding=ShardingConfig(compute=dict(COMPUTE_IN_SPACE)),
    )
