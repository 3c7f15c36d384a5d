"""Whether a data set that is derived from another one has what would be built: then it is not built again."""

import time
from collections.abc import Sequence
from typing import Any

from jvgen.data.builders.build_loop import Execution, Summary
from jvgen.data.store import dataset_info
from jvgen.data.store.records import KINDS
from jvgen.data.store.sources import bytes_of, open_source, read_metadata, splits
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


def _differences(name: str, before: Any, now: Any) -> list[str]:
    if not isinstance(before, dict):
        return [] if before == now else [f"{name} was {before}, now {now}"]
    keys = [key for key in before | now if before.get(key) != now.get(key)]
    return [f"{name}.{key} was {_short(before.get(key))}, now {_short(now.get(key))}" for key in keys]


def _short(value: Any) -> Any:
    return value[:12] if isinstance(value, str) else value
