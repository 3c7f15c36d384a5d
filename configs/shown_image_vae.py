"""The image VAE of a run to be shown: 64x64 frames with textures, 8x8 pixels per latent of 8 channels, on a CPU.

Should reach: PSNR 31 dB on held-out frames (measured).
Chips: a CPU with one core or more.
Memory: 2 GiB resident at most, with everything else of the process (measured).
Time: 0.97 s per step, 20 minutes for the run (measured on one core).
Data: six colors, three shapes, four directions and two camera motions over textured grounds:

    jvgen data build scenes --out runs/shown/scenes --train 640 --validation 48 --set frames=29 --set wander=0 \\
        --set kinds.image=0 --set kinds.static=0.25 --set kinds.dynamic=0.75 --set shapes=ball,cube,cylinder \\
        --set colors=red,yellow,green,blue,purple,cyan --set "camera_motions=orbit left,orbit right"
"""

from pathlib import Path

from jvgen import config
from jvgen.data.stream.config import BucketConfig
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.training.experiment import Experiment

SCENES = "runs/shown/scenes"


def network() -> ImageVAEConfig:
    """One level and four channels of latents more than the demo's."""
    return ImageVAEConfig.tiny().replace(block_channels=(16, 32, 64, 128), latent_channels=8, sample_size=64)


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
            buckets=(BucketConfig(frames=1, height=64, width=64, batch_size=8, kinds=("static", "dynamic")),),
        ),
        training=made.training.replace(steps=1200, log_every=50, visualize_every=0),
        checkpoint=made.checkpoint.replace(every=300),
    )
