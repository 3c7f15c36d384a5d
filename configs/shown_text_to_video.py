"""A text-to-video DiT to be shown: 29 frames of 64x64 pixels, scenes with textures, from a caption, on a CPU.

Should reach: sampled clips with the color and the direction of motion of their captions (48 of 48, measured).
Chips: a CPU with one core or more.
Memory: 2 GiB resident at most, with everything else of the process (measured).
Time: 1.1 s per step, 20 minutes for the run (measured on one core).
Data: that of `shown_image_vae.py`, encoded by the video VAE of `shown_cv_vae.py`:

    jvgen export runs/shown/video_vae --to runs/shown/export/video_vae
    jvgen data build latents runs/shown/scenes --vae runs/shown/export/video_vae/vae --size 64x64 \\
        --out runs/shown/latents

Set `task.latent_shift` and `task.latent_scale` as that command prints them.
"""

from pathlib import Path

from jvgen import config
from jvgen.diffusion.objective import ObjectiveConfig, TimestepConfig
from jvgen.training.experiment import Experiment

HERE = Path(__file__).parent
LATENTS = "runs/shown/latents"


def experiment() -> Experiment:
    made = config.load(HERE / "demo_text_to_video.py")
    vae = config.load(HERE / "shown_cv_vae.py").task.network
    task, data = made.task, made.data
    (bucket,), (training,), (held_out,) = data.buckets, data.sources, data.evaluation_sources
    return made.replace(
        name="shown_text_to_video",
        task=task.replace(
            # It was trained with six layers.
            denoiser=task.denoiser.replace(
                layers=6, in_channels=vae.latent_channels, out_channels=vae.latent_channels, sample_frames=8
            ),
            vae=vae,
            vae_weights="runs/shown/export/video_vae/vae",
            spatial_compression=8,
            # What it was trained with; its samples took 16 of these steps (docs/measured.md).
            objective=ObjectiveConfig(target="velocity", timesteps=TimestepConfig(kind="logit_normal")),
            sampler=task.sampler.replace(steps=25),
        ),
        data=data.replace(
            buckets=(bucket.replace(frames=29, height=64, width=64),),
            sources=(training.replace(path=LATENTS),),
            evaluation_sources=(held_out.replace(path=LATENTS),),
            kind_weights={"static": 0.2, "dynamic": 0.8},
        ),
        training=made.training.replace(steps=1000, log_every=50),
        ema=made.ema.replace(decays=(0.99,)),
        checkpoint=made.checkpoint.replace(every=100),
    )
