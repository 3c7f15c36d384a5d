"""The video VAE of a run to be shown: `shown_image_vae.py` inflated, 4x8x8 pixels per latent of 8 channels, on a CPU.

Should reach: PSNR 30.6 dB on held-out clips of 29 frames, 30.9 with the image decoder (measured).
Chips: a CPU with one core or more.
Memory: 3 GiB resident at most, with everything else of the process (measured).
Time: 3.4 s per step, 8 minutes for the run (measured on one core).
Data: that of `shown_image_vae.py`. Its weights are the start:

    jvgen export runs/shown/image_vae --to runs/shown/export/image_vae
    jvgen import runs/shown/export/image_vae/vae --inflate --config configs/shown_cv_vae.py --to runs/shown/video_vae
"""

from pathlib import Path

from jvgen import config
from jvgen.data.stream.config import BucketConfig
from jvgen.models.cv_vae.config import CVVAEConfig
from jvgen.training.experiment import Experiment

HERE = Path(__file__).parent
SCENES = "runs/shown/scenes"


def network() -> CVVAEConfig:
    """Causal; frames between those of two latents start as blends."""
    return CVVAEConfig.causal(config.load(HERE / "shown_image_vae.py").task.network).replace(blend_frames=True)


def experiment() -> Experiment:
    made = config.load(HERE / "demo_cv_vae.py")
    data = made.data
    (training,), (held_out,) = data.sources, data.evaluation_sources
    return made.replace(
        name="shown_cv_vae",
        task=made.task.replace(
            network=network(),
            image_vae=config.load(HERE / "shown_image_vae.py").task.network,
            image_vae_weights="runs/shown/export/image_vae/vae",
        ),
        data=data.replace(
            sources=(training.replace(path=SCENES),),
            evaluation_sources=(held_out.replace(path=SCENES),),
            buckets=(BucketConfig(frames=9, height=64, width=64, batch_size=2, kinds=("static", "dynamic")),),
        ),
        training=made.training.replace(steps=120),
        checkpoint=made.checkpoint.replace(every=60),
    )
