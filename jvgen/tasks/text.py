"""Captions to embeddings: one interface to the two text encoders that a task can be conditioned on."""

import dataclasses
import functools
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jvgen.config import Config
from jvgen.data.store.empty_caption import read_empty_caption
from jvgen.data.stream.source_checks import text_embeddings_of
from jvgen.interop.architecture import check_architecture
from jvgen.interop.digest import content_digest
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
from jvgen.nn.network import Network, Parameters, run_frozen
from jvgen.parallel import axes
from jvgen.storage import as_path
from jvgen.tasks.task import ArraySpec, activation_dtype
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
      padding: of captions shorter than `length`. "attended": T5 attends to it and its embeddings are conditions too, as
        in CogVideoX and RepVideo. "zeros": T5 leaves it out and its embeddings are zeros, so that cached embeddings are
        as long as their captions.
      embeddings: data set with embeddings of its captions (`jvgen data build text-embeddings`), such as the run's own:
        batches bring them, and T5 is neither loaded nor part of the step. `weights` and `tokenizer` are then needed
        for prompts only. None computes them in the step.
    """

    encoder: ByteTextConfig | T5Config
    length: Width = 226
    weights: str | None = None
    tokenizer: str | None = None
    unconditional: Literal["empty_caption", "zeros"] = "empty_caption"
    padding: Literal["attended", "zeros"] = "attended"
    embeddings: str | None = None

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
        if isinstance(self.encoder, ByteTextConfig) and (self.embeddings is not None or self.padding != "attended"):
            raise ValueError(
                f"embeddings = {self.embeddings!r}, padding = {self.padding!r}: a byte encoder is trained with the "
                "denoiser, so that nothing of it can be cached; leave embeddings none and padding 'attended'."
            )

    def check_files(self) -> None:
        """Raise `ValueError` for files of a frozen encoder that are not named, missing, or of another encoder."""
        if isinstance(self.encoder, ByteTextConfig):
            return
        if self.embeddings is not None:
            made_with = text_embeddings_of(self.embeddings)
            wrong = [
                f"{name} {str(made_with[name])[:12]}, and not {str(value)[:12]}"
                for name, value in self.made_with().items()
                if made_with[name] != value
            ]
            if wrong:
                raise ValueError(f"task.text.embeddings = {self.embeddings!r}: made with {'; '.join(wrong)}.")
            return
        if self.weights is None:
            raise ValueError("task.text.weights = none: name a local folder with the T5 encoder's weights.")
        if self.tokenizer is None:
            raise ValueError("task.text.tokenizer = none: name a local folder with T5's tokenizer.")
        check_architecture(self.weights, self.encoder, "task.text.weights")
        if as_path(self.tokenizer).is_dir():
            check_digests(as_path(self.tokenizer))
        t5_tokenizer.load(self.tokenizer)

    def made_with(self) -> dict[str, Any]:
        """What cached embeddings must have been made with, as far as this configuration says it."""
        known: dict[str, Any] = {"length": self.length, "padding": self.padding, "width": self.width}
        known |= {} if self.weights is None else {"encoder": content_digest(self.weights)}
        return known | ({} if self.tokenizer is None else {"tokenizer": tokenizer_digest(self.tokenizer)})


def tokenizer_digest(folder: str) -> str:
    """Hash of the file that a tokenizer is read from."""
    path = next(as_path(folder) / name for name in t5_tokenizer.FILES if (as_path(folder) / name).is_file())
    return content_digest(path)


class TextEncoder:
    """Tokenizer and network of a `TextConfig`, or the embeddings that stand for them.

    In batches captions are token ids, int32 `B L`, or cached embeddings, uint16 `B L C`: the bits of bfloat16, which
    NumPy does not have. The methods that take captions take either.

    Attributes:
      frozen: whether the encoder is not trained.
      cached: whether batches bring embeddings.
      network: the encoder; None with cached embeddings.
      field: name of the captions in batches.
    """

    def __init__(self, config: TextConfig):
        self.config = config
        self.frozen = isinstance(config.encoder, T5Config)
        self.cached = config.embeddings is not None
        self.field = "text" if self.cached else "tokens"
        encoder = T5Encoder if self.frozen else ByteTextEncoder
        self.network = None if self.cached else Network.of(lambda rngs: encoder(config.encoder, rngs=rngs))

    def load(self) -> Parameters:
        """Weights of a frozen encoder; `TextConfig.check_files` checks the files."""
        return import_folder(self.config.weights)[1]

    def digest(self) -> str:
        """Content hash of a frozen encoder's weights: the same whether embeddings are cached or not."""
        if self.cached:
            return text_embeddings_of(self.config.embeddings)["encoder"]
        return content_digest(self.config.weights)

    def fields(self) -> dict[str, ArraySpec]:
        """The captions of a batch, by `field`."""
        if not self.cached:
            return {self.field: ArraySpec((self.config.length,), np.dtype(np.int32), (None,))}
        shape = (self.config.length, self.config.width)
        return {self.field: ArraySpec(shape, np.dtype(np.uint16), (None, None))}

    def of_example(self, example: dict[str, Any]) -> dict[str, np.ndarray]:
        """The arrays of `fields` of an example of `jvgen.data.stream.transforms.load_example`.

        Raises:
          ValueError: it has no cached embedding.
        """
        if not self.cached:
            return {self.field: self.tokenize(example["caption"])}
        if "text" not in example and example["caption"]:
            raise ValueError(
                "task.text.embeddings is set, but the data set has no embeddings of its captions: make them with "
                "`jvgen data build text-embeddings`, or set it to none."
            )
        embedding = example.get("text", ())
        return {self.field: self._padded(embedding if len(embedding) else self._empty)}

    @functools.cached_property
    def _empty(self) -> np.ndarray:
        return read_empty_caption(self.config.embeddings)

    def _padded(self, embedding: np.ndarray) -> np.ndarray:
        padded = np.zeros((self.config.length, self.config.width), np.uint16)
        padded[: len(embedding)] = embedding.view(np.uint16)
        return padded

    def tokenize(self, caption: str) -> np.ndarray:
        """Token ids of a caption, int32 `[length]`."""
        if not self.frozen:
            return byte_tokenizer.tokenize(caption, self.config.length)
        return self._t5_tokenizer(caption, self.config.length)

    def truncated_text(self, caption: str) -> str:
        """The end of a caption that `tokenize` truncates, or ""."""
        if not self.frozen:
            return byte_tokenizer.truncated_text(caption, self.config.length)
        return self._t5_tokenizer.truncated_text(caption, self.config.length)

    @functools.cached_property
    def _t5_tokenizer(self):
        assert self.config.tokenizer is not None, "TextConfig.check_files() requires it"
        return t5_tokenizer.load(self.config.tokenizer)

    def unconditional(self) -> jax.Array:
        """The caption, of one row, of the unconditional embedding: the empty one, or what stands for zeros."""
        if self.config.unconditional == "zeros":
            if self.cached:
                return jnp.zeros((self.config.length, self.config.width), jnp.uint16)
            return jnp.full((self.config.length,), -1, jnp.int32)
        return jnp.asarray(self._padded(self._empty) if self.cached else self.tokenize(""))

    def flops(self) -> float:
        """Forward FLOPs of encoding one caption; 0 for cached embeddings."""
        if self.cached:
            return 0.0
        count = t5_flops if isinstance(self.config.encoder, T5Config) else byte_text_flops
        return sum(count.forward_flops(self.config.encoder, self.config.length).values())

    def embed(self, parameters: Parameters | None, captions: jax.Array, *, adapted: Any = None) -> jax.Array:
        """Embeddings `B L C` of captions; token ids of -1 give zeros.

        Args:
          parameters: the encoder's, if it has any.
          captions: see the class.
          adapted: the encoder with these parameters and a LoRA beside its layers (`jvgen.nn.lora.bind`); None without.
        """
        if self.cached:
            return jax.lax.bitcast_convert_type(captions, jnp.bfloat16)
        masked, absent = self.config.padding == "zeros", captions < 0
        alone = adapted is None
        mask = (captions != t5_tokenizer.PAD,) if masked else ()

        def run() -> jax.Array:
            encoder = self.network.bind(parameters) if alone else adapted
            return encoder(jnp.maximum(captions, 0), *mask, dtype=activation_dtype(parameters))

        is_frozen = self.frozen and alone
        embeddings = run_frozen(run, len(captions), axes.HEADS, axes.MLP) if is_frozen else run()
        if masked:
            absent |= captions == t5_tokenizer.PAD
        return jnp.where(absent[..., None], jnp.zeros((), embeddings.dtype), embeddings)
