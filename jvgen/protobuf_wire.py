"""The wire format of protocol buffers: the fields of a message, without a schema and without copies.

https://protobuf.dev/programming-guides/encoding. Libraries need a compiled schema, copy every value, and TensorFlow's
schemas take seconds to import.
"""

from collections.abc import Iterator

VARINT, EIGHT_BYTES, BYTES, FOUR_BYTES = 0, 1, 2, 5  # kinds of values


def fields(message: bytes | memoryview) -> Iterator[tuple[int, int | bytes | memoryview]]:
    """(number, value) of every field of a message; values are integers or parts of the message.

    Raises:
      ValueError, IndexError: not a message.
    """
    position = 0
    while position < len(message):
        key, position = varint(message, position)
        kind = key & 7
        if kind == VARINT:
            value, position = varint(message, position)
            yield key >> 3, value
            continue
        if kind == BYTES:
            length, position = varint(message, position)
        elif kind in (FOUR_BYTES, EIGHT_BYTES):
            length = 4 if kind == FOUR_BYTES else 8
        else:
            raise ValueError(f"a field of kind {kind} at byte {position}")
        if position + length > len(message):
            raise ValueError(f"truncated at byte {len(message)}")
        yield key >> 3, message[position : position + length]
        position += length


def varint(message: bytes | memoryview, position: int) -> tuple[int, int]:
    """A number with seven bits per byte, lowest first, modulo 2**64, and the position after it; raises as `fields`."""
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value & (2**64 - 1), position
        if shift > 63:
            raise ValueError(f"a number without an end at byte {position}")
