"""Both networks, in the module where `jvgen.interop.formats` looks for them."""

from jvgen.models.ivideogpt.tokenizer import CompressiveTokenizer
from jvgen.models.ivideogpt.transformer import FrameTransformer

__all__ = ["CompressiveTokenizer", "FrameTransformer"]
