"""Reads a whole data set and compares it with the checksums of its index."""

import concurrent.futures
import dataclasses
import hashlib
import itertools

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
    borders = list(itertools.accumulate((shard.records for shard in source.shards), initial=0))
    done, found = 0, []
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        spans = list(itertools.pairwise(borders))
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
    written = int(source.index.checksum[row])
    try:
        if not of_content:
            digest = hashlib.blake2b(source.serialized(row), digest_size=8).digest()
            if int.from_bytes(digest, "little") == written:
                return None
        if records.checksum_of(source.read(row)) == written:
            return None
    except (CorruptShard, FileNotFoundError) as error:
        return str(error)
    return "its content is not what was written"
