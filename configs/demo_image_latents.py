"""The demo's text-to-video DiT on latents of the image VAE: 5 frames of 32x32 pixels from a caption, on a CPU.

Should reach: sampled clips whose color is that of their captions, and the direction in 9 of 10, and with
`jvgen sample RUN --vae runs/demo/export/video_vae/vae` clips of 17 frames from the same latents, without tuning
(`notebooks/cv_vae.ipynb`).
Chips: a CPU with 2 cores.
Memory: as `demo_text_to_video.py`.
Time: 0.6 to 0.77 s per step, 4 to 6 minutes for the run (measured with 8 frames).
Data: after `make demo`, `jvgen data build latents runs/demo/scenes --vae runs/demo/export/image_vae/vae --size 32x32
--stride 4 --out runs/demo/image_latents`. Set `task.latent_shift` and `task.latent_scale` as that command prints them.
"""

from pathlib import Path

from jvgen import config
from jvgen.diffusion.objective import ObjectiveConfig, TimestepConfig
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.training.experiment import Experiment

LATENTS = "runs/demo/image_latents"


def experiment() -> Experiment:
    made = config.load(Path(__file__).with_name("demo_text_to_video.py"))
    task, data = made.task, made.data
    (bucket,), (training,), (held_out,) = data.buckets, data.sources, data.evaluation_sources
    return made.replace(
        name="demo_image_latents",
        task=task.replace(
            # It was measured with six layers.
            denoiser=task.denoiser.replace(layers=6, temporal_compression=1),
            vae=ImageVAEConfig.tiny(),
            vae_weights="runs/demo/export/image_vae/vae",
            temporal_compression=1,
            # Two cameras and the notebook of CV-VAE were measured with these.
            objective=ObjectiveConfig(target="velocity", timesteps=TimestepConfig(kind="logit_normal")),
            sampler=task.sampler.replace(steps=25),
        ),
        data=data.replace(
            buckets=(bucket.replace(frames=5),),
            sources=(training.replace(path=LATENTS),),
            evaluation_sources=(held_out.replace(path=LATENTS),),
        ),
        training=made.training.replace(steps=420),
        checkpoint=made.checkpoint.replace(every=100),
    )
