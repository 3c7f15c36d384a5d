"""Networks as single-device code, one folder per network with the same files.

These are `config`, `model`, `flops`, `torch_map` and a README. No model knows a task, an optimizer, a file or a mesh
axis.
The names below are usable as `jvgen.models.NAME`; each is imported when it is first used. They are Flax NNX modules and
their configs, usable on their own (`VideoDiT(config, rngs=nnx.Rngs(0))`), `Network`, which separates a module from its
parameters, and the papers' ideas as functions: RepVideo's `aggregation_plan`, Enhance-A-Video's `factors_with_mean`,
CV-VAE's `inflate`, `map_frames` and `draw_picks`, CVD's `camera_band`.
"""

import importlib
from typing import Any

_MODULES = {
    "aggregation_plan": "jvgen.models.video_dit.aggregation",
    "AggregationConfig": "jvgen.models.video_dit.config",
    "ByteTextConfig": "jvgen.models.byte_text.config",
    "ByteTextEncoder": "jvgen.models.byte_text.model",
    "camera_band": "jvgen.models.multiview.view_conditioning",
    "ClipDiscriminator": "jvgen.models.clip_discriminator.model",
    "ClipDiscriminatorConfig": "jvgen.models.clip_discriminator.config",
    "ClipNormConfig": "jvgen.models.cv_vae.config",
    "CogVideoXVAE": "jvgen.models.cogvideox_vae.model",
    "CogVideoXVAEConfig": "jvgen.models.cogvideox_vae.config",
    "CompressiveTokenizer": "jvgen.models.ivideogpt.tokenizer",
    "CompressiveTokenizerConfig": "jvgen.models.ivideogpt.config",
    "CVVAE": "jvgen.models.cv_vae.model",
    "CVVAEConfig": "jvgen.models.cv_vae.config",
    "draw_picks": "jvgen.losses.frame_mapping",
    "EnhanceConfig": "jvgen.models.video_dit.enhance",
    "factors_with_mean": "jvgen.models.video_dit.enhance",
    "FrameTransformer": "jvgen.models.ivideogpt.transformer",
    "FrameTransformerConfig": "jvgen.models.ivideogpt.config",
    "ImageVAE": "jvgen.models.image_vae.model",
    "ImageVAEConfig": "jvgen.models.image_vae.config",
    "inflate": "jvgen.models.cv_vae.inflate",
    "map_frames": "jvgen.losses.frame_mapping",
    "MultiViewDiT": "jvgen.models.multiview.model",
    "MultiViewDiTConfig": "jvgen.models.multiview.config",
    "Network": "jvgen.nn.network",
    "SyncConfig": "jvgen.models.multiview.config",
    "T5Config": "jvgen.models.t5.config",
    "T5Encoder": "jvgen.models.t5.model",
    "VideoDiT": "jvgen.models.video_dit.model",
    "VideoDiTConfig": "jvgen.models.video_dit.config",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'jvgen.models' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
