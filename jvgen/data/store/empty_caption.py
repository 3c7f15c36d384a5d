"""The embedding of the empty caption, in the metadata of a data set that has embeddings of its captions."""

import base64
import zlib

import ml_dtypes
import numpy as np

from jvgen.data.store.sources import find_dataset, read_metadata
from jvgen.storage import Path

NAME = "empty_caption"  # in jvgen.json


def packed(embedding: np.ndarray) -> str:
    """A bfloat16 array (rows, C) as text."""
    return base64.b64encode(zlib.compress(embedding.view("<u2").tobytes())).decode()


def read_empty_caption(folder: str | Path) -> np.ndarray:
    """The embedding of the empty caption, bfloat16 (rows, C), of a data set with embeddings of its captions."""
    metadata = read_metadata(find_dataset(folder))
    content = zlib.decompress(base64.b64decode(metadata[NAME]))
    return np.frombuffer(content, "<u2").view(ml_dtypes.bfloat16).reshape(-1, metadata["text_embeddings"]["width"])
