"""Captions to embeddings: one interface to the two text encoders that a task can be conditioned on."""

import contextlib
import dataclasses
import functools
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jvgen.config import Config
from jvgen.interop.architecture import check_architecture
from jvgen.interop.file_digests import check_digests
from jvgen.interop.from_torch import import_folder
from jvgen.models.byte_text import flops as byte_text_flops
from jvgen.models.byte_text import tokenizer as byte_tokenizer
from jvgen.models.byte_text.config import ByteTextConfig
from jvgen.models.byte_text.model import ByteTextEncoder
from jvgen.models.t5 import flops as t5_flops
from jvgen.models.t5 import tokenizer as t5_tokenizer
from jvgen.models.t5.config import T5Config
from jvgen.models.t5.model import T5Encoder
from jvgen.nn.network import FROZEN_SCOPE, Network, Parameters
from jvgen.storage import as_path
from jvgen.tasks.task import activation_dtype
from jvgen.value_rules import Width


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig(Config):
    """Which text encoder.

    Attributes:
      encoder: a byte encoder is trained with the denoiser and needs no files; T5 is frozen and read from `weights`.
      length: tokens per caption, padded or truncated.
      weights: exported folder, or transformers folder, of a T5 encoder.
      tokenizer: folder with T5's tokenizer.json or spiece.model.
      unconditional: embedding for dropped captions and classifier-free guidance: that of the empty caption, or zeros
        (as CogVideoX was trained).
    """

    encoder: ByteTextConfig | T5Config
    length: Width = 226
    weights: str | None = None
    tokenizer: str | None = None
    unconditional: Literal["empty_caption", "zeros"] = "empty_caption"

    renamed_fields: ClassVar[dict[str, str]] = {"null": "unconditional"}

    @classmethod
    def upgrade(cls, saved: dict[str, Any]) -> dict[str, Any]:
        saved = super().upgrade(saved)
        return saved | {"unconditional": "empty_caption"} if saved.get("unconditional") == "empty" else saved

    @property
    def width(self) -> int:
        """Channels of the embeddings."""
        return self.encoder.width

    def validate(self) -> None:
        if isinstance(self.encoder, ByteTextConfig) and (self.weights or self.tokenizer):
            raise ValueError("a byte encoder is trained with the denoiser: leave weights and tokenizer none.")

    def check_files(self) -> None:
        """Raise `ValueError` for files of a frozen encoder that are not named, missing, or of another encoder."""
        if isinstance(self.encoder, ByteTextConfig):
            return
        if self.weights is None:
            raise ValueError("task.text.weights = none: name a local folder with the T5 encoder's weights.")
        if self.tokenizer is None:
            raise ValueError("task.text.tokenizer = none: name a local folder with T5's tokenizer.")
        check_architecture(self.weights, self.encoder, "task.text.weights")
        if as_path(self.tokenizer).is_dir():
            check_digests(as_path(self.tokenizer))
        t5_tokenizer.load(self.tokenizer)


class TextEncoder:
    """Tokenizer and network of a `TextConfig`.

    Attributes:
      frozen: whether the encoder is not trained.
      network: the encoder.
    """

    def __init__(self, config: TextConfig):
        self.config = config
        self.frozen = isinstance(config.encoder, T5Config)
        encoder = T5Encoder if self.frozen else ByteTextEncoder
        self.network = Network.of(lambda rngs: encoder(config.encoder, rngs=rngs))

    def load(self) -> Parameters:
        """Weights of a frozen encoder; `TextConfig.check_files` checks the files."""
        return import_folder(self.config.weights)[1]

    def tokenize(self, caption: str) -> np.ndarray:
        """Token ids of a caption, int32 `[length]`."""
        if not self.frozen:
            return byte_tokenizer.tokenize(caption, self.config.length)
        return self._t5_tokenizer(caption, self.config.length)

    def truncated_text(self, caption: str) -> str:
        """The end of a caption that `tokenize` truncates, or ""; always "" for a byte encoder."""
        return self._t5_tokenizer.truncated_text(caption, self.config.length) if self.frozen else ""

    @functools.cached_property
    def _t5_tokenizer(self):
        assert self.config.tokenizer is not None, "TextConfig.check_files() requires it"
        return t5_tokenizer.load(self.config.tokenizer)

    def unconditional_tokens(self) -> jax.Array:
        """Token ids of the unconditional embedding: those of the empty caption, or -1 for zero embeddings."""
        if self.config.unconditional == "zeros":
            return jnp.full((self.config.length,), -1, jnp.int32)
        return jnp.asarray(self.tokenize(""))

    def flops(self) -> float:
        """Forward FLOPs of encoding one caption."""
        count = t5_flops if isinstance(self.config.encoder, T5Config) else byte_text_flops
        return sum(count.forward_flops(self.config.encoder, self.config.length).values())

    def embed(self, parameters: Parameters, tokens: jax.Array) -> jax.Array:
        """Embeddings `B L C` of token ids `B L`; rows of -1 give zeros."""
        with jax.named_scope(FROZEN_SCOPE) if self.frozen else contextlib.nullcontext():
            embeddings = self.network.apply(parameters, jnp.maximum(tokens, 0), dtype=activation_dtype(parameters))
        return jnp.where(tokens[..., None] < 0, jnp.zeros((), embeddings.dtype), embeddings)
