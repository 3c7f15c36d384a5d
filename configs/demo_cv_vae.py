"""The demo's causal CV-VAE: 32x32 clips of the embedded scenes, inflated from the demo's image VAE, on a CPU.

Should reach: PSNR 30.4 dB on held-out clips of 17 frames, 4x4x4 pixels per latent, with latents that the image VAE's
decoder reads within 1 dB of its own.
Chips: a CPU with 2 cores.
Memory: 2.0 GiB resident at most, with everything else of the process (measured).
Time: 0.40 s per step (measured beside one other job).
Data: that of `demo_image_vae.py`. Start with `jvgen import runs/demo/export/image_vae/vae --inflate --config
configs/demo_cv_vae.py --to runs/demo/video_vae`. Run by `make demo`.
"""

from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.losses.perceptual import PerceptualConfig
from jvgen.models.cv_vae.config import CVVAEConfig
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.parallel.mesh import MeshConfig
from jvgen.parallel.rules import SPATIAL_SHARDING, ShardingConfig
from jvgen.tasks.video_vae import SharedLatentsConfig, VideoVAETaskConfig
from jvgen.training.config import CheckpointConfig, PrecisionConfig, TrainingConfig
from jvgen.training.experiment import Experiment
from jvgen.training.optimization.ema import EmaConfig
from jvgen.training.optimization.optimizer import OptimizerConfig

SCENES = "runs/demo/scenes"


def experiment() -> Experiment:
    return Experiment(
        name="demo_cv_vae",
        task=VideoVAETaskConfig(
            network=CVVAEConfig.causal(ImageVAEConfig.tiny()).replace(blend_frames=True),
            image_vae=ImageVAEConfig.tiny(),
            image_vae_weights="runs/demo/export/image_vae/vae",
            shared=SharedLatentsConfig(decoder_weight=1.0, mapping="random"),
            perceptual=PerceptualConfig(kind="laplacian", levels=3),
            perceptual_weight=0.25,
            kl_weight=1e-4,
            learned_scales=False,
        ),
        data=DataConfig(
            sources=(SourceConfig(path=SCENES),),
            evaluation_sources=(SourceConfig(path=SCENES, split="validation"),),
            buckets=(BucketConfig(frames=9, height=32, width=32, batch_size=2, kinds=("static", "dynamic")),),
            threads=2,
        ),
        optimizer=OptimizerConfig(
            kind="adamw", learning_rate=2e-4, warmup_steps=10, schedule="cosine", weight_decay=1e-3
        ),
        training=TrainingConfig(steps=90, precision=PrecisionConfig(compute_dtype="float32"), log_every=20),
        ema=EmaConfig(decays=(0.98,), parameters="vae/"),
        checkpoint=CheckpointConfig(every=45, keep_last=2),
        # Few clips do not divide over many devices; their rows do.
        mesh=MeshConfig(fsdp=1, seq=-1),
        sharding=ShardingConfig(compute=dict(SPATIAL_SHARDING)),
    )
