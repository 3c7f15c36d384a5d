"""Whether a data set that is derived from another one has what would be built, and may be added to."""

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from jvgen.data.builders.assembly import joined_digests
from jvgen.data.builders.build_loop import Execution, Summary, those_in
from jvgen.data.store import dataset_info
from jvgen.data.store.index import Index
from jvgen.data.store.records import KINDS
from jvgen.data.store.sources import Source, bytes_of, open_source, read_metadata, splits
from jvgen.storage import Path, absolute


def existing(
    out: str | Path, metadata: dict[str, Any], names: Sequence[str], *, overwrite: bool, execution: Execution
) -> Summary | None:
    """The summary of the data set at `out` if it was made of the same; None if it has to be built.

    Args:
      out: folder of the data set, which need not exist.
      metadata: that it would have.
      names: of the metadata that records depend on; for appending the first of them is compared.
      overwrite: replace what differs.
      execution: of the build.

    Raises:
      ValueError: it was made of something else, and may not be replaced; the message says what differs.
    """
    began, folder = time.perf_counter(), absolute(out)
    if overwrite or execution.parts > 1 or not (folder / dataset_info.NAME).is_file():
        return None
    made_with = read_metadata(folder)
    compared = names[:1] if execution.append else names
    differences = [line for name in compared for line in _differences(name, made_with.get(name), metadata[name])]
    if differences:
        fix = "append to another data set" if execution.append else "pass --overwrite to make it again"
        raise ValueError(
            f"out = {str(out)!r} was made of something else: {'; '.join(differences)}. It is stale for this: {fix}, or "
            "use another folder."
        )
    if execution.append:
        return None
    counts, digests = {}, {}
    for split in splits(folder):
        index = open_source(folder, split).index
        by_kind = {kind: int((index.kind == code).sum()) for code, kind in enumerate(KINDS)}
        counts[split] = {kind: count for kind, count in by_kind.items() if count}
        digests[split] = index.digest
    size = sum(bytes_of(folder, split) for split in counts)
    note = {"up to date: records that were there": sum(sum(kinds.values()) for kinds in counts.values())}
    return Summary(folder, counts, (), digests, size, time.perf_counter() - began, notes=note)


def source_digests(sources: Mapping[str, Source], out: str | Path, execution: Execution) -> dict[str, str]:
    """Digests by split of what the data set at `out` will be made of, once it is built from `sources` or extended.

    What is added to must be of the same records: `sources` have grown, or have none that it has been made of.

    Raises:
      ValueError: to append, to what was made of other records with the same ids.
    """
    now = {split: source.index.digest for split, source in sources.items()}
    folder = absolute(out)
    if not execution.append or not (folder / dataset_info.NAME).is_file():
        return now
    before = read_metadata(folder).get("source_digests") or {}
    known = those_in(folder, {str(id) for source in sources.values() for id in source.index.id})
    grown = (split in sources and _begins_with(sources[split].index, before[split], known) for split in before)
    if before and all(grown):
        return now
    changed = next((str(id) for source in sources.values() for id in source.index.id if id in known), None)
    if changed is not None:
        raise ValueError(
            f"out = {str(out)!r} has records of the same ids as its source, such as {changed!r}, but was not made "
            "of the first of these alone: the source was built again, and not only added to, or records of another "
            "source were added. Pass --overwrite instead of --append to make all of it again, or use another folder."
        )
    return joined_digests(before, now)


def _begins_with(index: Index, digest: str, known: Collection[str]) -> bool:
    """Whether the first shards of an index have records of this digest, among them all that are known."""
    if index.digest == digest:
        return True
    last = max((row for row, id in enumerate(index.id) if id in known), default=None)
    if last is None:
        return False
    ends = np.cumsum([shard.records for shard in index.shards])
    return any(index.take(slice(0, int(end))).computed_digest() == digest for end in ends[:-1] if end > last)


def _differences(name: str, before: Any, now: Any) -> list[str]:
    if not isinstance(before, dict):
        return [] if before == now else [f"{name} was {before}, now {now}"]
    keys = [key for key in before | now if before.get(key) != now.get(key)]
    return [f"{name}.{key} was {_short(before.get(key))}, now {_short(now.get(key))}" for key in keys]


def _short(value: Any) -> Any:
    return value[:12] if isinstance(value, str) else value
