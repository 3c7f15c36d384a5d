"""The published recipes of CogVideoX (arXiv 2408.06072): what every run on its latents and captions shares."""

from typing import Any

from jvgen.diffusion.schedule import ScheduleConfig
from jvgen.models.cogvideox_vae.config import CogVideoXVAEConfig
from jvgen.models.t5.config import xxl
from jvgen.tasks.text import TextConfig

T5_XXL = "weights/t5_v1_1_xxl"


def cogvideox_2b_recipe() -> dict[str, Any]:
    """Fields of `TextToVideoConfig` or `MultiViewConfig`: T5 v1.1 XXL, latents of CogVideoX's VAE, noise schedule."""
    return _recipe(latent_scale=1.15258426, snr_shift=3.0, text_length=226)


def cogvideox_5b_recipe(*, text_length: int = 226) -> dict[str, Any]:
    """As `cogvideox_2b_recipe`, for CogVideoX-5B and, with 224 tokens of text, CogVideoX1.5-5B."""
    return _recipe(latent_scale=0.7, snr_shift=1.0, text_length=text_length)


def first_frame_recipe(vae_weights: str, *, invert_scale: bool = False) -> dict[str, Any]:
    """Fields of `TextToVideoConfig` for image to video with CogVideoX-5B, or 1.5, which inverts the scale."""
    vae = CogVideoXVAEConfig.cogvideox_5b().replace(invert_scale_latents=invert_scale)
    return {"condition": "first_frame", "vae": vae, "vae_weights": vae_weights}


def _recipe(*, latent_scale: float, snr_shift: float, text_length: int) -> dict[str, Any]:
    return {
        "text": TextConfig(encoder=xxl(), length=text_length, weights=T5_XXL, tokenizer=T5_XXL, unconditional="zeros"),
        "latent_scale": latent_scale,
        "spatial_compression": 8,
        "temporal_compression": 4,
        "schedule": ScheduleConfig(kind="cogvideox", snr_shift=snr_shift),
    }
