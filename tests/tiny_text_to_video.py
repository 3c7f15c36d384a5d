"""The smallest run of the text-to-video task that has all its parts, for tests of the task and of its config."""

import jax

from jvgen.data.stream.config import BucketConfig
from jvgen.diffusion.guidance import GuidanceConfig
from jvgen.diffusion.objective import ObjectiveConfig
from jvgen.diffusion.sampler import SamplerConfig
from jvgen.diffusion.schedule import ScheduleConfig
from jvgen.models.byte_text.config import ByteTextConfig
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.models.video_dit.config import VideoDiTConfig
from jvgen.nn.network import Parameters
from jvgen.tasks.text import TextConfig
from jvgen.tasks.text_to_video import TextToVideoConfig

VAE = ImageVAEConfig.tiny().replace(block_channels=(8, 8), groups=4)
CONFIG = TextToVideoConfig(
    denoiser=VideoDiTConfig(
        layers=1, heads=2, head_width=8, in_channels=4, out_channels=4, text_width=8, text_length=6, condition_width=8,
    ),
    text=TextConfig(encoder=ByteTextConfig(width=8, layers=1, heads=2), length=6),
    vae=VAE,
    vae_weights="vae",
    spatial_compression=2,
    temporal_compression=1,
    latent_scale=2.0,
    latent_shift=0.25,
    schedule=ScheduleConfig(kind="rectified_flow"),
    objective=ObjectiveConfig(target="velocity"),
    sampler=SamplerConfig(kind="euler", steps=2),
    guidance=GuidanceConfig(kind="constant", scale=3.0),
)  # fmt: skip
BUCKET = BucketConfig(frames=3, height=8, width=8, batch_size=4)


def random_frozen() -> Parameters:
    """Random parameters of the frozen networks."""
    return {"vae": jax.jit(CONFIG.build().frozen_networks["vae"].init)(jax.random.key(1))}
