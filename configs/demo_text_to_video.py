"""The demo's text-to-video DiT: 17 frames of 32x32 pixels from a caption, as 5 latent frames of a CV-VAE, on a CPU.

Should reach: sampled clips whose color and direction of motion are those of their captions (the report says how often).
Chips: a CPU with 2 cores.
Memory: 1.5 GiB resident at most, with everything else of the process (measured).
Time: 0.4 s per step, 3 minutes for the run with its restart (measured on two slow cores).
Data: `jvgen data build latents runs/demo/scenes --vae runs/demo/export/video_vae/vae --size 32x32 --out
runs/demo/latents`. Run by `make demo`, which also sets the latents' scale and shift as that command prints them.
"""

from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.diffusion.guidance import GuidanceConfig
from jvgen.diffusion.objective import ObjectiveConfig, TimestepConfig
from jvgen.diffusion.sampler import SamplerConfig
from jvgen.diffusion.schedule import ScheduleConfig
from jvgen.models.byte_text.config import ByteTextConfig
from jvgen.models.cv_vae.config import CVVAEConfig
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.models.video_dit.config import VideoDiTConfig
from jvgen.tasks.text import TextConfig
from jvgen.tasks.text_to_video import TextToVideoConfig
from jvgen.training.config import CheckpointConfig, PrecisionConfig, TrainingConfig
from jvgen.training.experiment import Experiment
from jvgen.training.optimization.ema import EmaConfig
from jvgen.training.optimization.optimizer import OptimizerConfig

LATENTS = "runs/demo/latents"


def experiment() -> Experiment:
    return Experiment(
        name="demo_text_to_video",
        task=TextToVideoConfig(
            denoiser=VideoDiTConfig(
                layers=4,
                heads=2,
                head_width=64,
                in_channels=4,
                out_channels=4,
                text_width=128,
                text_length=48,
                condition_width=128,
                sample_height=8,
                sample_width=8,
                sample_frames=5,
                spatial_scale=1.0,
                temporal_compression=4,
            ),
            text=TextConfig(encoder=ByteTextConfig(width=128, layers=2, heads=4), length=48),
            vae=CVVAEConfig.causal(ImageVAEConfig.tiny()).replace(blend_frames=True),
            vae_weights="runs/demo/export/video_vae/vae",
            spatial_compression=4,
            temporal_compression=4,
            schedule=ScheduleConfig(kind="rectified_flow"),
            # Left and right are decided in the noise: shifted there, fewer steps are as often right.
            objective=ObjectiveConfig(target="velocity", timesteps=TimestepConfig(kind="logit_normal", shift=2.0)),
            sampler=SamplerConfig(kind="euler", steps=16),
            guidance=GuidanceConfig(kind="constant", scale=3.0),
        ),
        data=DataConfig(
            sources=(SourceConfig(path=LATENTS),),
            evaluation_sources=(SourceConfig(path=LATENTS, split="validation"),),
            buckets=(BucketConfig(frames=17, height=32, width=32, batch_size=16, kinds=("static", "dynamic")),),
            kind_weights={"static": 0.05, "dynamic": 0.95},
            threads=2,
        ),
        optimizer=OptimizerConfig(
            kind="muon", learning_rate=6e-3, warmup_steps=10, schedule="cosine", weight_decay=0.01
        ),
        training=TrainingConfig(steps=340, precision=PrecisionConfig(compute_dtype="float32"), log_every=20),
        ema=EmaConfig(decays=(0.98,)),
        checkpoint=CheckpointConfig(every=85, keep_last=2),
    )
