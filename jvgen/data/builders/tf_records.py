"""Reads TFRecord files without TensorFlow, with their checksums."""

import functools
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import google_crc32c

from jvgen.data.image_files import DecodeError

_LENGTH, _CHECKSUM = 8, 4  # bytes of a record's header
_GZIP = b"\x1f\x8b"


def tf_records(path: Path, *, checksums: bool = True) -> Iterator[Callable[[], bytes]]:
    """Functions that read the records of a file: each is stored as a length, its checksum, the bytes, and theirs.

    A function raises `DecodeError` for a damaged or truncated record. Behind a damaged length nothing can be found.

    Args:
      path: of the file.
      checksums: check them; some programs write zeros.
    """
    size, offset = path.stat().st_size, 0
    with path.open("rb") as file:
        while offset < size:
            file.seek(offset)
            head, checksum = file.read(_LENGTH), file.read(_CHECKSUM)
            if len(checksum) < _CHECKSUM:
                yield functools.partial(_fail, "truncated: the file ends within the length of this record")
                return
            length = struct.unpack("<Q", head)[0]
            if (checksums and _is_wrong(checksum, head)) or length > size:
                reason = "the checksum of its length is wrong" if checksums else f"its length is {length}"
                reason = f"{reason}: no record from here on can be read"
                # A length of a record may begin with these bytes, too.
                if offset == 0 and head.startswith(_GZIP):
                    reason = "compressed with gzip: decompress it first"
                yield functools.partial(_fail, reason)
                return
            offset += _LENGTH + _CHECKSUM
            yield functools.partial(_read, path, offset, length, checksums)
            offset += length + _CHECKSUM


def _read(path: Path, offset: int, length: int, checksums: bool) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        found = file.read(length)
        checksum = file.read(_CHECKSUM)
    if len(found) < length or len(checksum) < _CHECKSUM:
        raise DecodeError("truncated: the file ends within this record")
    if checksums and _is_wrong(checksum, found):
        raise DecodeError("its checksum is wrong: the record is damaged")
    return found


def _fail(reason: str) -> bytes:
    raise DecodeError(reason)


def _is_wrong(stored: bytes, content: bytes) -> bool:
    return struct.unpack("<I", stored)[0] != _masked(google_crc32c.value(content))


def _masked(checksum: int) -> int:
    """As TFRecord stores it."""
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF
