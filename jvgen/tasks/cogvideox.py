"""CogVideoX-2B's published recipe (arXiv 2408.06072): what every run on its latents and captions shares."""

from typing import Any

from jvgen.diffusion.schedule import ScheduleConfig
from jvgen.models.t5.config import xxl
from jvgen.tasks.text import TextConfig

T5_XXL = "weights/t5_v1_1_xxl"


def cogvideox_2b_recipe() -> dict[str, Any]:
    """Fields of `TextToVideoConfig` or `MultiViewConfig`: T5 v1.1 XXL, latents of CogVideoX's VAE, noise schedule."""
    return {
        "text": TextConfig(encoder=xxl(), length=226, weights=T5_XXL, tokenizer=T5_XXL, unconditional="zeros"),
        "latent_scale": 1.15258426,
        "spatial_compression": 8,
        "temporal_compression": 4,
        "schedule": ScheduleConfig(kind="cogvideox", snr_shift=3.0),
    }
