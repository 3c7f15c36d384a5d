"""The demo's text-to-video DiT on latents of the image VAE: 8 frames of 32x32 pixels from a caption, on a CPU.

Should reach: sampled clips whose color and direction of motion are those of their captions, and with
`jvgen sample RUN --vae runs/demo/export/video_vae/vae` clips of 29 frames from the same latents, without tuning
(`notebooks/cv_vae.ipynb`).
Chips: a CPU with 2 cores.
Memory: as `demo_text_to_video.py`.
Time: as `demo_text_to_video.py` (measured there).
Data: after `make demo`, `jvgen data build latents runs/demo/scenes --vae runs/demo/export/image_vae/vae --size 32x32
--stride 4 --out runs/demo/image_latents`. Set `task.latent_shift` and `task.latent_scale` as that command prints them.
"""

from pathlib import Path

from jvgen import config
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
            denoiser=task.denoiser.replace(temporal_compression=1),
            vae=ImageVAEConfig.tiny(),
            vae_weights="runs/demo/export/image_vae/vae",
            temporal_compression=1,
        ),
        data=data.replace(
            buckets=(bucket.replace(frames=8),),
            sources=(training.replace(path=LATENTS),),
            evaluation_sources=(held_out.replace(path=LATENTS),),
        ),
    )
