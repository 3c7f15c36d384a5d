"""Networks as single-device code, one folder per network with the same files.

These are `config`, `model`, `flops`, `torch_map` and a README. No model knows a task, an optimizer, a file or a mesh
axis.
The names below are Flax NNX modules and their configs, usable on their own: `VideoDiT(config, rngs=nnx.Rngs(0))`.
"""

import importlib
from typing import Any

_MODULES = {
    "ByteTextConfig": "byte_text.config",
    "ByteTextEncoder": "byte_text.model",
    "ClipDiscriminator": "clip_discriminator.model",
    "ClipDiscriminatorConfig": "clip_discriminator.config",
    "CogVideoXVAE": "cogvideox_vae.model",
    "CogVideoXVAEConfig": "cogvideox_vae.config",
    "CompressiveTokenizer": "ivideogpt.tokenizer",
    "CompressiveTokenizerConfig": "ivideogpt.config",
    "CVVAE": "cv_vae.model",
    "CVVAEConfig": "cv_vae.config",
    "FrameTransformer": "ivideogpt.transformer",
    "FrameTransformerConfig": "ivideogpt.config",
    "ImageVAE": "image_vae.model",
    "ImageVAEConfig": "image_vae.config",
    "MultiViewDiT": "multiview.model",
    "MultiViewDiTConfig": "multiview.config",
    "T5Config": "t5.config",
    "T5Encoder": "t5.model",
    "VideoDiT": "video_dit.model",
    "VideoDiTConfig": "video_dit.config",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'jvgen.models' has no attribute {name!r}")
    return getattr(importlib.import_module(f"jvgen.models.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
