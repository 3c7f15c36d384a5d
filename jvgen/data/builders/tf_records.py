"""Reads TFRecord files without TensorFlow, with their checksums."""

import functools
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from jvgen.data.image_files import DecodeError

_LENGTH, _CHECKSUM = 8, 4  # bytes of a record's header
_POLYNOMIAL = 0x82F63B78  # of CRC-32C (Castagnoli), reflected
_LANES = 4096  # parts of a buffer that are computed at once


def tf_records(path: Path, *, checksums: bool = True) -> Iterator[Callable[[], bytes]]:
    """Functions that read the records of a file: each is stored as a length, its checksum, the bytes, and theirs.

    A function raises `DecodeError` for a damaged or truncated record. Behind a damaged length nothing can be found.

    Args:
      path: of the file.
      checksums: check them; some programs write zeros.
    """

    size, offset = path.stat().st_size, 0
    with path.open("rb") as file:
        if file.read(2) == b"\x1f\x8b":
            yield functools.partial(_fail, "compressed with gzip: decompress it first")
            return
        while offset < size:
            file.seek(offset)
            head, checksum = file.read(_LENGTH), file.read(_CHECKSUM)
            if len(checksum) < _CHECKSUM:
                yield functools.partial(_fail, "truncated: the file ends within the length of this record")
                return
            length = struct.unpack("<Q", head)[0]
            if (checksums and _is_wrong(checksum, head)) or length > size:
                reason = "the checksum of its length is wrong" if checksums else f"its length is {length}"
                yield functools.partial(_fail, f"{reason}: no record from here on can be read")
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
    return struct.unpack("<I", stored)[0] != _masked(crc32c(content))


def crc32c(data: bytes) -> int:
    """The CRC-32C of some bytes."""
    if not data:
        return 0
    state = np.frombuffer(data, np.uint8).copy()
    # A register of ones at the start is the same as inverted first bytes and zeros, in front of which zeros do nothing.
    state[:4] ^= 0xFF
    short = 0xFFFFFFFF >> 8 * len(data) if len(data) < 4 else 0
    lanes = 1 << max(0, min(_LANES, len(state) // 16).bit_length() - 1)
    length = -(-len(state) // lanes)
    padded = np.zeros(lanes * length, np.uint8)
    padded[lanes * length - len(state) :] = state
    table, registers = _table(), np.zeros(lanes, np.uint32)
    for column in padded.reshape(lanes, length).T:
        registers = table[(registers ^ column) & 0xFF] ^ (registers >> 8)
    while len(registers) > 1:
        registers = _apply(_shift_tables(length), registers[::2]) ^ registers[1::2]
        length *= 2
    return int(registers[0]) ^ short ^ 0xFFFFFFFF


def _masked(checksum: int) -> int:
    """As TFRecord stores it."""
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


@functools.cache
def _table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> 1) ^ np.where(table & 1, np.uint32(_POLYNOMIAL), np.uint32(0))
    return table


@functools.lru_cache(maxsize=64)
def _shift_tables(zeros: int) -> np.ndarray:
    """uint32 (4, 256): what each value of each byte of a register becomes by that many bytes of zero."""
    if zeros == 1:
        values = np.arange(256, dtype=np.uint32)
        registers = np.stack([values << 8 * byte for byte in range(4)])
        return _table()[registers & 0xFF] ^ (registers >> 8)
    half = _shift_tables(zeros // 2)
    doubled = _apply(half, half)
    return _apply(_shift_tables(1), doubled) if zeros % 2 else doubled


def _apply(tables: np.ndarray, registers: np.ndarray) -> np.ndarray:
    """A linear map of registers, byte by byte."""
    return (
        tables[0][registers & 0xFF]
        ^ tables[1][registers >> 8 & 0xFF]
        ^ tables[2][registers >> 16 & 0xFF]
        ^ tables[3][registers >> 24]
    )
