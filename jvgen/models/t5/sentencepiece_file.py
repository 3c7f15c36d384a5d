"""Reader of sentencepiece vocabulary files (`spiece.model`), for the fields of a unigram tokenizer.

The file is a protocol buffer (https://github.com/google/sentencepiece, `sentencepiece_model.proto`): a sequence of
fields with a number, a kind and a value. The package `sentencepiece` is not used, because it can crash the interpreter
in a process that has loaded other compiled modules.
"""

import dataclasses
import struct
from collections.abc import Iterator
from pathlib import Path

from jvgen.storage import reading

# Field numbers of the messages.
PIECES, TRAINER, NORMALIZER = 1, 2, 3
PIECE_TEXT, PIECE_SCORE = 1, 2
MODEL_TYPE, UNIGRAM = 3, 1
CHARACTER_MAP = 2
# Kinds of values.
VARINT, EIGHT_BYTES, BYTES, FOUR_BYTES = 0, 1, 2, 5


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Pieces of text with their log probabilities, by token id, and the character map that normalizes text."""

    pieces: tuple[tuple[str, float], ...]
    character_map: bytes


def read_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary in a file.

    Raises:
      ValueError: a corrupt file, or a model that is not a unigram model.
    """
    pieces, character_map, model_type = [], b"", UNIGRAM
    with reading(path, "is a corrupt sentencepiece file"):
        for number, value in _fields(path.read_bytes()):
            if number == PIECES:
                fields = dict(_fields(value))
                score = struct.unpack("<f", fields[PIECE_SCORE])[0] if PIECE_SCORE in fields else 0.0
                pieces.append((fields[PIECE_TEXT].decode("utf-8"), score))
            elif number == TRAINER:
                model_type = dict(_fields(value)).get(MODEL_TYPE, UNIGRAM)
            elif number == NORMALIZER:
                character_map = dict(_fields(value)).get(CHARACTER_MAP, b"")
    if not pieces:
        raise ValueError(f"{str(path)!r} is not a sentencepiece file: it has no pieces.")
    if model_type != UNIGRAM:
        raise ValueError(f"{str(path)!r} holds a sentencepiece model of type {model_type}; T5 has a unigram model (1).")
    return Vocabulary(tuple(pieces), character_map)


class _Corrupt(Exception):
    pass


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of every field of a message."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        kind = key & 7
        if kind == VARINT:
            value, position = _varint(message, position)
            yield key >> 3, value
            continue
        if kind == BYTES:
            length, position = _varint(message, position)
        elif kind in (FOUR_BYTES, EIGHT_BYTES):
            length = 4 if kind == FOUR_BYTES else 8
        else:
            raise _Corrupt(f"a field of kind {kind} at byte {position}")
        if position + length > len(message):
            raise _Corrupt(f"truncated at byte {len(message)}")
        yield key >> 3, message[position : position + length]
        position += length


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """A number with seven bits per byte, lowest first, and the position after it."""
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
        if shift > 63:
            raise _Corrupt(f"a number without an end at byte {position}")
