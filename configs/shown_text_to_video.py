"""A text-to-video DiT to be shown: 16 frames of 64x64 pixels, scenes with textures, from a caption, on a CPU overnight.

Should reach: not run yet.
Chips: a CPU with 2 cores, or any GPU.
Memory: 2.9 GiB resident with everything else of the process (measured over a few steps).
Time: 7.3 s per step on one core (measured over 4 steps), so six hours for the run.
Data: that of `shown_image_vae.py`, encoded by its VAE:

    jvgen export runs/shown/image_vae --to runs/shown/export/image_vae
    jvgen data build latents runs/shown/scenes --vae runs/shown/export/image_vae/vae --size 64x64 \\
        --out runs/shown/latents

Set `task.latent_shift` and `task.latent_scale` as that command prints them.
"""

from pathlib import Path

from jvgen import config
from jvgen.training.experiment import Experiment

HERE = Path(__file__).parent
LATENTS = "runs/shown/latents"


def experiment() -> Experiment:
    made = config.load(HERE / "demo_image_latents.py")
    vae = config.load(HERE / "shown_image_vae.py").task.network
    task, data = made.task, made.data
    (bucket,), (training,), (held_out,) = data.buckets, data.sources, data.evaluation_sources
    return made.replace(
        name="shown_text_to_video",
        task=task.replace(
            denoiser=task.denoiser.replace(layers=8, heads=3, sample_height=16, sample_width=16, sample_frames=16),
            vae=vae,
            vae_weights="runs/shown/export/image_vae/vae",
        ),
        data=data.replace(
            buckets=(bucket.replace(frames=16, height=64, width=64, batch_size=8),),
            sources=(training.replace(path=LATENTS),),
            evaluation_sources=(held_out.replace(path=LATENTS),),
            kind_weights={"static": 0.3, "dynamic": 0.7},
        ),
        optimizer=made.optimizer.replace(warmup_steps=50),
        training=made.training.replace(steps=3000, log_every=50),
        ema=made.ema.replace(decays=(0.995,)),
        checkpoint=made.checkpoint.replace(every=100),
    )
