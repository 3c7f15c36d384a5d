"""The compressive tokenizer: many tokens per context frame, few per future frame, which is coded given the context."""

from typing import NamedTuple

import jax
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from jvgen.models.ivideogpt.backbone import BackboneOutput, Condition, Decoder, Encoder
from jvgen.models.ivideogpt.codebook import Codebook, Quantized
from jvgen.models.ivideogpt.config import CompressiveTokenizerConfig
from jvgen.nn.conv import DEFAULT_INIT
from jvgen.nn.dropout import folded
from jvgen.nn.linear import Linear
from jvgen.parallel.axes import CONV_IN, CONV_OUT

ENCODER_DROPOUT, DECODER_DROPOUT = 0, 1

Conditions = tuple[Condition, ...]


class Tokens(NamedTuple):
    """Codebook indices of a clip, int32, each counted from 0 within its own codebook.

    Attributes:
      context: `B T N`, row by row of the latent grid.
      future: `B F M`, row by row of the grid of patches.
    """

    context: jax.Array
    future: jax.Array


class Reconstruction(NamedTuple):
    """Reconstruction of a clip, with what its losses need.

    Attributes:
      context, future: reconstructed frames, `B T H W 3` and `B F H W 3`, not clipped.
      context_codes, future_codes: the two quantized latents with their losses.
      future_last: input of the last convolution of the future frames, `(B F) H W C`.
    """

    context: jax.Array
    future: jax.Array
    context_codes: Quantized
    future_codes: Quantized
    future_last: jax.Array


class CompressiveTokenizer(nnx.Module):
    """Two autoencoders of one architecture: of context frames, and of future frames, which attend to the context.

    Frames are floats in [0, 1]. A future frame's tokens depend on the context and on that frame alone. The prediction
    encoder attends to feature maps of the context encoder (of the true frames), the prediction decoder to those of the
    context decoder (of the quantized frames).
    """

    def __init__(self, config: CompressiveTokenizerConfig, *, rngs: nnx.Rngs):
        config.validate()
        self.config = config
        latent, width = config.latent_channels, config.code_width
        patch = config.patch**2 * latent

        def linear(features_in: int, features_out: int) -> Linear:
            return Linear(features_in, features_out, axes=(CONV_IN, CONV_OUT), kernel_init=DEFAULT_INIT, rngs=rngs)

        self.encoder = Encoder(config, reads_context=False, rngs=rngs)
        self.prediction_encoder = Encoder(config, reads_context=True, rngs=rngs)
        self.decoder = Decoder(config, reads_context=False, rngs=rngs)
        self.prediction_decoder = Decoder(config, reads_context=True, rngs=rngs)
        self.to_context_code, self.from_context_code = linear(latent, width), linear(width, latent)
        self.to_future_code, self.from_future_code = linear(patch, width), linear(width, patch)
        options = {"commitment": config.commitment, "rngs": rngs}
        self.context_codebook = Codebook(config.context_codes, width, **options)
        self.future_codebook = Codebook(config.future_codes, width, **options)

    # Frames to latents.

    def encode_context(self, frames: Float[Array, "B T H W C"]) -> tuple[Float[Array, "B T N D"], Conditions]:
        """Latents of context frames before quantization, and the prediction encoder's conditions."""
        encoded = self.encoder(rearrange(frames, "b t h w c -> (b t) h w c"))
        maps = {
            level: rearrange(value, "(b t) h w c -> b t h w c", b=frames.shape[0])
            for level, value in encoded.maps.items()
        }
        latents = rearrange(self.to_context_code(encoded.output), "(b t) h w d -> b t (h w) d", b=frames.shape[0])
        return latents, self.prediction_encoder.conditions(maps)

    def encode_future(
        self, frames: Float[Array, "B F H W C"], conditions: Conditions, keys: Key[Array, "B"] | None = None
    ) -> Float[Array, "B F M D"]:
        """Latents of future frames before quantization, one per patch of the latent grid."""
        encoded = self.prediction_encoder(rearrange(frames, "b f h w c -> (b f) h w c"), conditions, keys)
        patches = rearrange(
            encoded.output, "(b f) (h p) (w q) c -> b f (h w) (p q c)", b=frames.shape[0], p=self.config.patch,
            q=self.config.patch,
        )  # fmt: skip
        return self.to_future_code(patches)

    # Latents to frames.

    def decode_context(self, vectors: Float[Array, "B T N D"]) -> tuple[Float[Array, "B T H W C"], Conditions]:
        """Context frames of quantized latents, not clipped, and the prediction decoder's conditions."""
        latents = rearrange(self.from_context_code(vectors), "b t (h w) z -> (b t) h w z", h=self.config.grid)
        decoded = self.decoder(latents)
        frames, *maps = (
            rearrange(value, "(b t) h w c -> b t h w c", b=vectors.shape[0])
            for value in (decoded.output, *decoded.maps.values())
        )
        return frames, self.prediction_decoder.conditions(dict(zip(decoded.maps, maps, strict=True)))

    def decode_future(
        self, vectors: Float[Array, "B F M D"], conditions: Conditions, keys: Key[Array, "B"] | None = None
    ) -> Float[Array, "B F H W C"]:
        """Future frames of quantized latents, not clipped."""
        frames = self._decode_future(vectors, conditions, keys).output
        return rearrange(frames, "(b f) h w c -> b f h w c", b=vectors.shape[0])

    def _decode_future(
        self, vectors: Float[Array, "B F M D"], conditions: Conditions, keys: Key[Array, "B"] | None = None
    ) -> BackboneOutput:
        patch = self.config.patch
        latents = rearrange(
            self.from_future_code(vectors), "b f (h w) (p q z) -> (b f) (h p) (w q) z", p=patch, q=patch,
            h=self.config.grid // patch,
        )  # fmt: skip
        return self.prediction_decoder(latents, conditions, keys)

    def future_pixels(self, last: Float[Array, "N H W C"]) -> Float[Array, "N H W 3"]:
        """The last convolution of future frames."""
        return self.prediction_decoder.conv_out(last)

    # Tokens.

    def tokenize(self, frames: Float[Array, "B F H W C"]) -> Tokens:
        """Tokens of clips: the first `context_frames` frames are the context."""
        count = self.config.context_frames
        latents, conditions = self.encode_context(frames[:, :count])
        future = self.encode_future(frames[:, count:], conditions)
        return Tokens(self.context_codebook.nearest(latents), self.future_codebook.nearest(future))

    def tokenize_context(self, frames: Float[Array, "B T H W C"]) -> Int[Array, "B T N"]:
        """Tokens of context frames alone: the prompt of a rollout."""
        return self.context_codebook.nearest(self.encode_context(frames)[0])

    def detokenize_context(
        self, ids: Int[Array, "B T N"], dtype: jax.typing.DTypeLike = "float32"
    ) -> tuple[Float[Array, "B T H W C"], Conditions]:
        """Context frames of tokens, not clipped, and the conditions for decoding any number of future frames."""
        return self.decode_context(self.context_codebook(ids).astype(dtype))

    def detokenize_future(self, ids: Int[Array, "B F M"], conditions: Conditions) -> Float[Array, "B F H W C"]:
        """Future frames of tokens, not clipped, in the dtype of the conditions."""
        return self.decode_future(self.future_codebook(ids).astype(conditions[0].key.dtype), conditions)

    def detokenize(self, tokens: Tokens, dtype: jax.typing.DTypeLike = "float32") -> Float[Array, "B F H W C"]:
        """All frames of clips, context first, not clipped."""
        context, conditions = self.detokenize_context(tokens.context, dtype)
        return jax.numpy.concatenate([context, self.detokenize_future(tokens.future, conditions)], axis=1)

    def __call__(self, frames: Float[Array, "B F H W C"], keys: Key[Array, "B"] | None = None) -> Reconstruction:
        """Encode, quantize and decode clips; with dropout if keys are given."""
        count = self.config.context_frames
        latents, conditions = self.encode_context(frames[:, :count])
        context = self.context_codebook.quantize(latents)
        future = self.future_codebook.quantize(
            self.encode_future(frames[:, count:], conditions, folded(keys, ENCODER_DROPOUT))
        )
        context_frames, conditions = self.decode_context(context.vectors)
        decoded = self._decode_future(future.vectors, conditions, folded(keys, DECODER_DROPOUT))
        future_frames = rearrange(decoded.output, "(b f) h w c -> b f h w c", b=frames.shape[0])
        return Reconstruction(context_frames, future_frames, context, future, decoded.last)
