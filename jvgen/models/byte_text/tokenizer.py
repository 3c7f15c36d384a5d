"""Captions as UTF-8 bytes: a tokenizer that needs no files."""

import numpy as np

PAD, END = 0, 1
FIRST_BYTE = 2
VOCABULARY = FIRST_BYTE + 256


def tokenize(caption: str, length: int) -> np.ndarray:
    """int32 `[length]`: the bytes of the caption, an end token, padding.

    A longer caption is truncated between characters and still ends with the end token.

    Raises:
      ValueError: a length below 1.
    """
    if length < 1:
        raise ValueError(f"length = {length}: must be at least 1, for the end token.")
    kept = _kept(caption, length).encode("utf-8")
    tokens = np.full(length, PAD, np.int32)
    tokens[: len(kept)] = np.frombuffer(kept, np.uint8).astype(np.int32) + FIRST_BYTE
    tokens[len(kept)] = END
    return tokens


def truncated_text(caption: str, length: int) -> str:
    """The text that is truncated if a caption has more than `length` tokens, including the end token; or ""."""
    return caption[len(_kept(caption, length)) :].strip()


def _kept(caption: str, length: int) -> str:
    return caption.encode("utf-8")[: length - 1].decode("utf-8", errors="ignore")


def detokenize(tokens: np.ndarray) -> str:
    """The (possibly truncated) caption of token ids."""
    values = [int(token) for token in tokens]
    stop = values.index(END) if END in values else len(values)
    return bytes(value - FIRST_BYTE for value in values[:stop] if value >= FIRST_BYTE).decode("utf-8", errors="ignore")
