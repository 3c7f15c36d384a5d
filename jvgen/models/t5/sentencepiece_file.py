"""Reader of sentencepiece vocabulary files (`spiece.model`), for the fields of a unigram tokenizer.

The file is a protocol buffer (https://github.com/google/sentencepiece, `sentencepiece_model.proto`): a sequence of
fields with a number, a kind and a value. The package `sentencepiece` is not used, because it can crash the interpreter
in a process that has loaded other compiled modules.
"""

import dataclasses
import struct
from pathlib import Path

from jvgen.protobuf_wire import fields
from jvgen.storage import reading

# Field numbers of the messages.
PIECES, TRAINER, NORMALIZER = 1, 2, 3
PIECE_TEXT, PIECE_SCORE = 1, 2
MODEL_TYPE, UNIGRAM = 3, 1
CHARACTER_MAP = 2


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
        for number, value in fields(path.read_bytes()):
            if number == PIECES:
                piece = dict(fields(value))
                score = struct.unpack("<f", piece[PIECE_SCORE])[0] if PIECE_SCORE in piece else 0.0
                pieces.append((piece[PIECE_TEXT].decode("utf-8"), score))
            elif number == TRAINER:
                model_type = dict(fields(value)).get(MODEL_TYPE, UNIGRAM)
            elif number == NORMALIZER:
                character_map = dict(fields(value)).get(CHARACTER_MAP, b"")
    if not pieces:
        raise ValueError(f"{str(path)!r} is not a sentencepiece file: it has no pieces.")
    if model_type != UNIGRAM:
        raise ValueError(f"{str(path)!r} holds a sentencepiece model of type {model_type}; T5 has a unigram model (1).")
    return Vocabulary(tuple(pieces), character_map)
