"""Reads a whole data set and compares it with the checksums of its index."""

import concurrent.futures
import dataclasses
import hashlib

from jvgen.data.store import records
from jvgen.data.store.index_files import checksums_are_of_content, verify_index
from jvgen.data.store.shards import CorruptShard
from jvgen.data.store.sources import Source, open_source
from jvgen.storage import Path
from jvgen.terminal import Report


@dataclasses.dataclass(frozen=True)
class Damage:
    """A record that is not what was written.

    Attributes:
      id, row: of the record.
      reason: what is wrong with it.
    """

    id: str
    row: int
    reason: str


def verify(folder: str | Path, split: str, threads: int = 4, progress: Report | None = None) -> list[Damage]:
    """Damaged records of a split, in order; every byte of it is read, several shards at a time.

    Raises:
      ValueError: as `open_source`; an index that is damaged itself.
    """
    source = open_source(folder, split)
    verify_index(source.index, threads)
    of_content = checksums_are_of_content(source.index)
    borders = [0]
    for shard in source.index.shards:
        borders.append(borders[-1] + shard.records)
    if borders[-1] != len(source):
        borders = [0, len(source)]  # of 0.1.0
    done, found = 0, []
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        spans = list(zip(borders, borders[1:], strict=False))
        for span, damages in zip(spans, pool.map(lambda span: _damages(source, *span, of_content), spans), strict=True):
            found += damages
            done += span[1] - span[0]
            if progress is not None:
                progress(done, len(source))
    return found


def _damages(source: Source, start: int, stop: int, of_content: bool) -> list[Damage]:
    found = []
    for row in range(start, stop):
        reason = _problem(source, row, of_content)
        if reason is not None:
            found.append(Damage(source.index.id[row], row, reason))
    return found


def _problem(source: Source, row: int, of_content: bool) -> str | None:
    try:
        if of_content:
            checksum = records.checksum_of(source.read(row))
        else:
            digest = hashlib.blake2b(source.serialized(row), digest_size=8).digest()
            checksum = int.from_bytes(digest, "little")
    except (CorruptShard, FileNotFoundError) as error:
        return str(error)
    return None if checksum == int(source.index.checksum[row]) else "its content is not what was written"
