"""Networks as single-device code, one folder per network with the same files.

These are `config`, `model`, `flops`, `torch_map` and a README. No model knows a task, an optimizer, a file or a mesh
axis.
The names below are usable as `jvgen.models.NAME`; each is imported when it is first used. They are Flax NNX modules and
their configs, usable on their own (`VideoDiT(config, rngs=nnx.Rngs(0))`), `Network`, which separates a module from its
parameters, and the papers' ideas as functions: RepVideo's `aggregation_plan`, Enhance-A-Video's `factors_with_mean`,
CV-VAE's `inflate`, `map_frames` and `draw_picks`, CVD's `camera_band`.
"""

from jvgen.lazy_names import lazy_names

_MODULES = {
    "aggregation_plan": "models.video_dit.aggregation",
    "AggregationConfig": "models.video_dit.config",
    "ByteTextConfig": "models.byte_text.config",
    "ByteTextEncoder": "models.byte_text.model",
    "camera_band": "models.multiview.view_conditioning",
    "ClipDiscriminator": "models.clip_discriminator.model",
    "ClipDiscriminatorConfig": "models.clip_discriminator.config",
    "ClipNormConfig": "models.cv_vae.config",
    "CogVideoXVAE": "models.cogvideox_vae.model",
    "CogVideoXVAEConfig": "models.cogvideox_vae.config",
    "CompressiveTokenizer": "models.ivideogpt.tokenizer",
    "CompressiveTokenizerConfig": "models.ivideogpt.config",
    "CVVAE": "models.cv_vae.model",
    "CVVAEConfig": "models.cv_vae.config",
    "Dinov2": "models.dinov2.model",
    "Dinov2Config": "models.dinov2.config",
    "draw_picks": "losses.frame_mapping",
    "EnhanceConfig": "models.video_dit.enhance",
    "factors_with_mean": "models.video_dit.enhance",
    "FrameTransformer": "models.ivideogpt.transformer",
    "FrameTransformerConfig": "models.ivideogpt.config",
    "ImageVAE": "models.image_vae.model",
    "ImageVAEConfig": "models.image_vae.config",
    "inflate": "models.cv_vae.inflate",
    "map_frames": "losses.frame_mapping",
    "MultiViewDiT": "models.multiview.model",
    "MultiViewDiTConfig": "models.multiview.config",
    "Network": "nn.network",
    "SyncConfig": "models.multiview.config",
    "T5Config": "models.t5.config",
    "T5Encoder": "models.t5.model",
    "VideoDiT": "models.video_dit.model",
    "VideoDiTConfig": "models.video_dit.config",
}

__all__ = list(_MODULES)
__getattr__, __dir__ = lazy_names(__name__, _MODULES)
