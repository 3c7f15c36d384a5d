"""The demo's image-to-video DiT: a clip of 29 frames of 32x32 pixels from its first frame and a caption, on a CPU.

Should reach: after 280 steps, a first frame at 31.0 dB PSNR to the given one (31.4 is the autoencoder's limit), and
clips that go on as their captions say (`docs/measured.md`).
Chips: a CPU with 2 cores.
Memory: 1.7 GiB resident at most, with everything else of the process (measured).
Time: that of `demo_text_to_video.py` and the encoding of a frame; 3.4 to 4.4 s per step were measured on a machine that
was shared by ten other jobs.
Data: as `demo_text_to_video.py`, with the pixels that given frames are encoded from: `jvgen data build latents
runs/demo/scenes --vae runs/demo/export/video_vae/vae --size 32x32 --keep-clips --out runs/demo/latents_and_clips`. Set
task.latent_shift and task.latent_scale as that command prints them.
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

LATENTS = "runs/demo/latents_and_clips"


def experiment() -> Experiment:
    return Experiment(
        name="demo_image_to_video",
        task=TextToVideoConfig(
            denoiser=VideoDiTConfig(
                layers=6,
                heads=2,
                head_width=64,
                in_channels=8,  # noise, and the latents of the given frame
                out_channels=4,
                text_width=128,
                text_length=48,
                condition_width=128,
                sample_height=8,
                sample_width=8,
                sample_frames=8,
                spatial_scale=1.0,
                temporal_compression=4,
            ),
            text=TextConfig(encoder=ByteTextConfig(width=128, layers=2, heads=4), length=48),
            vae=CVVAEConfig.causal(ImageVAEConfig.tiny()).replace(blend_frames=True),
            vae_weights="runs/demo/export/video_vae/vae",
            condition="first_frame",
            spatial_compression=4,
            temporal_compression=4,
            schedule=ScheduleConfig(kind="rectified_flow"),
            objective=ObjectiveConfig(target="velocity", timesteps=TimestepConfig(kind="logit_normal")),
            sampler=SamplerConfig(kind="euler", steps=25),
            guidance=GuidanceConfig(kind="constant", scale=3.0),
        ),
        data=DataConfig(
            sources=(SourceConfig(path=LATENTS),),
            evaluation_sources=(SourceConfig(path=LATENTS, split="validation"),),
            buckets=(BucketConfig(frames=29, height=32, width=32, batch_size=16, kinds=("static", "dynamic")),),
            kind_weights={"static": 0.05, "dynamic": 0.95},
            threads=2,
        ),
        optimizer=OptimizerConfig(
            kind="muon", learning_rate=6e-3, warmup_steps=10, schedule="cosine", weight_decay=0.01
        ),
        training=TrainingConfig(steps=460, precision=PrecisionConfig(compute_dtype="float32"), log_every=20),
        ema=EmaConfig(decays=(0.98,)),
        checkpoint=CheckpointConfig(every=120, keep_last=2),
    )
