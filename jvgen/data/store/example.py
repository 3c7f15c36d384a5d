"""The wire format of `tf.train.Example`, without TensorFlow or TFDS: one encoding per content, and views on decoding.

Protobuf libraries write the features of an example in an order that differs from process to process. Here they are
sorted by name, so that a record has the same bytes wherever it is written.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from jvgen.protobuf_wire import BYTES, fields, varint

_BYTES_LIST, _FLOAT_LIST, _INT64_LIST = 1, 2, 3  # fields of a Feature
MAX_BYTES = 2**31 - 1  # of a message that protobuf libraries read

Value = Sequence[bytes] | np.ndarray


class NotAnExample(ValueError):
    """Bytes that are no serialized `tf.train.Example`."""


def serialize(features: Mapping[str, Value]) -> bytes:
    """Serialized example of features: sequences of bytes, float32 or int64 arrays (flattened)."""
    entries: list[bytes] = []
    for name in sorted(features):
        key = name.encode()
        value = _feature(features[name])
        entry = [b"\x0a", _varint(len(key)), key, b"\x12", _varint(_length(value)), *value]
        entries += [b"\x0a", _varint(_length(entry)), *entry]
    return b"".join([b"\x0a", _varint(_length(entries)), *entries])


def parse(serialized: bytes) -> dict[str, list[memoryview] | np.ndarray]:
    """Features of a serialized example: lists of views into `serialized`, float32 or int64 arrays.

    Raises:
      NotAnExample: the bytes are damaged, or something else.
    """
    features: dict[str, list[memoryview] | np.ndarray] = {}
    try:
        for _, message in fields(memoryview(serialized)):
            for _, entry in fields(message):
                parts = dict(fields(entry))
                features[bytes(parts[1]).decode()] = _value(parts.get(2, memoryview(b"")))
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise NotAnExample(f"not a serialized example ({error})") from error
    return features


def _feature(value: Value) -> list[bytes]:
    if isinstance(value, np.ndarray):
        if value.dtype.kind == "f":
            kind, content = _FLOAT_LIST, value.astype("<f4").tobytes()
        else:
            kind, content = _INT64_LIST, b"".join(_varint(int(number) % 2**64) for number in value.reshape(-1).tolist())
        items = [b"\x0a", _varint(len(content)), content] if content else []
    else:
        kind, items = _BYTES_LIST, [part for item in value for part in (b"\x0a", _varint(len(item)), item)]
    return [_varint(kind << 3 | BYTES), _varint(_length(items)), *items]


def _value(feature: memoryview) -> list[memoryview] | np.ndarray:
    for kind, content in fields(feature):
        if kind == _BYTES_LIST:
            return [item for _, item in fields(content)]
        if kind == _FLOAT_LIST:
            # A list may be in one piece (packed) or a value at a time.
            return np.frombuffer(b"".join(item for _, item in fields(content)), "<f4")
        if kind == _INT64_LIST:
            numbers = []
            for _, item in fields(content):
                numbers += [item] if isinstance(item, int) else _varints(item)
            return np.array(numbers, np.uint64).astype(np.int64)
    return []


def _varints(content: memoryview) -> list[int]:
    numbers, position = [], 0
    while position < len(content):
        number, position = varint(content, position)
        numbers.append(number)
    return numbers


def _varint(number: int) -> bytes:
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    parts.append(number)
    return bytes(parts)


def _length(parts: Sequence[bytes]) -> int:
    return sum(map(len, parts))
