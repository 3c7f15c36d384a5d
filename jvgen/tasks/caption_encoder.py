"""T5 as an encoder of batches of captions on all devices of this process, for caching embeddings on disk."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jvgen.nn.compute_dtype import cast
from jvgen.parallel import axes
from jvgen.parallel.mesh import MeshConfig, make_mesh
from jvgen.parallel.rules import Sharding, ShardingConfig
from jvgen.tasks.text import TextConfig, TextEncoder, tokenizer_digest


class T5Captions:
    """A `jvgen.data.builders.text_embeddings.CaptionEncoder`.

    Args:
      config: a T5 encoder with its files, and no cached embeddings.
      compute_dtype: "bfloat16", or "float32"; what is stored is bfloat16.
      batch: captions that a device embeds together.
      devices: by default all of this process; the encoder is whole on each if it fits there, else divided over them.

    Raises:
      ValueError: files that are missing, or not those of the encoder.
    """

    def __init__(
        self,
        config: TextConfig,
        *,
        compute_dtype: str = "bfloat16",
        batch: int = 8,
        devices: Sequence[jax.Device] | None = None,
    ):
        config.check_files()
        self._text, self._config = TextEncoder(config), config
        devices = jax.local_devices() if devices is None else devices
        self._batch, self._dtype = batch * len(devices), jnp.dtype(compute_dtype)
        names, shapes = self._text.network.axes, self._text.network.shapes
        sharding = Sharding(make_mesh(MeshConfig(), devices), ShardingConfig()).holding(names, shapes)
        self._place = sharding.activation((axes.BATCH, None), (self._batch, config.length))
        places = sharding.frozen(names, shapes)
        in_dtype = jax.jit(lambda tree: cast(tree, names, self._dtype), out_shardings=places, donate_argnums=0)
        self._parameters = in_dtype(jax.device_put(self._text.load(), places))

        def embed(parameters: Any, tokens: jax.Array) -> jax.Array:
            with axes.partitioned(sharding):
                return self._text.embed(parameters, tokens).astype(jnp.bfloat16)

        self._embed = jax.jit(embed)

    def made_with(self) -> dict[str, Any]:
        """What the embeddings depend on, for the metadata of a data set."""
        digests = {"encoder": self._text.digest(), "tokenizer": tokenizer_digest(self._config.tokenizer)}
        return {**self._config.made_with(), **digests, "compute_dtype": self._dtype.name}

    def tokenize(self, caption: str) -> np.ndarray:
        """Token ids of a caption, int32 `L`."""
        return self._text.tokenize(caption)

    def batch(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        """All captions share batches of one size."""
        return shape, self._batch

    def begin(self, captions: Sequence[np.ndarray]) -> Any:
        """Begin to embed at most one batch of tokens, and do not wait for it."""
        tokens = np.zeros((self._batch, self._config.length), np.int32)
        tokens[: len(captions)] = captions
        rows = [self._rows(caption) for caption in captions]
        return self._embed(self._parameters, jax.device_put(tokens, self._place)), rows

    def end(self, begun: Any) -> list[np.ndarray]:
        """Wait for a batch: bfloat16 `rows C` of each caption, as they are; they may hold NaN."""
        embedded, rows = begun
        bits = np.asarray(jax.lax.bitcast_convert_type(embedded, jnp.uint16))
        return [bits[number, :count].view(ml_dtypes.bfloat16) for number, count in enumerate(rows)]

    def _rows(self, tokens: np.ndarray) -> int:
        """Rows of an embedding: padding that is attended to is a condition too."""
        return len(tokens) if self._config.padding == "attended" else int(np.count_nonzero(tokens))
