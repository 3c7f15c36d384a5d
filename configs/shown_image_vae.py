"""The image VAE of a run to be shown: 64x64 frames of scenes with textures, 4x4 pixels per latent, on a CPU overnight.

Should reach: not run yet.
Chips: a CPU with 2 cores, or any GPU.
Memory: 1.8 GiB resident with everything else of the process (measured over a few steps).
Time: 1.1 s per step on one core (measured over 5 steps), so an hour and a half for the run.
Data: all shapes, colors and camera motions over textured grounds:

    jvgen data build scenes --out runs/shown/scenes --train 6000 --validation 200 --set frames=16 --set height=64 \\
        --set width=64
"""

from pathlib import Path

from jvgen import config
from jvgen.data.stream.config import BucketConfig
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.training.experiment import Experiment

SCENES = "runs/shown/scenes"


def network() -> ImageVAEConfig:
    """Twice the demo's channels."""
    return ImageVAEConfig.tiny().replace(block_channels=(32, 64, 128), sample_size=64)


def experiment() -> Experiment:
    made = config.load(Path(__file__).with_name("demo_image_vae.py"))
    data = made.data
    (training,), (held_out,) = data.sources, data.evaluation_sources
    return made.replace(
        name="shown_image_vae",
        task=made.task.replace(network=network()),
        data=data.replace(
            sources=(training.replace(path=SCENES),),
            evaluation_sources=(held_out.replace(path=SCENES),),
            buckets=(BucketConfig(frames=1, height=64, width=64, batch_size=8),),
        ),
        optimizer=made.optimizer.replace(warmup_steps=100),
        training=made.training.replace(steps=5000, log_every=50, visualize_every=1000),
        ema=made.ema.replace(decays=(0.998,)),
        checkpoint=made.checkpoint.replace(every=250),
    )
