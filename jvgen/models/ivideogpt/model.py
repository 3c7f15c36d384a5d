"""The networks of this room under the name that exporters and importers look for."""

from jvgen.models.ivideogpt.tokenizer import CompressiveTokenizer
from jvgen.models.ivideogpt.transformer import FrameTransformer

__all__ = ["CompressiveTokenizer", "FrameTransformer"]
