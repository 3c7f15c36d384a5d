"""Makes data sets of finished units: of a build, of its parts, or added to a data set that is there."""

import contextlib
import hashlib
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path as LocalPath
from typing import Any

from jvgen import storage
from jvgen.data.builders.build_folder import BuildInfo, checked_parts, is_worth_keeping, linked, locked, remove
from jvgen.data.builders.jobs import BuildError
from jvgen.data.builders.summary import REJECTED_LOG, Summary, log_line, summary_of
from jvgen.data.builders.units import Done
from jvgen.data.store import dataset_info
from jvgen.data.store.out_folder import check_out, move_to_out, out_folder
from jvgen.data.store.publish import append, append_in_bucket, publish, publish_to_bucket
from jvgen.data.store.shard_writer import rows_path
from jvgen.data.store.sources import read_metadata
from jvgen.storage import Path, absolute, is_remote


def merge_parts(
    parts: Sequence[str | Path],
    out: str | Path,
    *,
    error_budget: float | None = None,
    overwrite: bool = False,
) -> Summary:
    """Make a data set of the parts of a build: the same files as a build without parts makes.

    The parts are removed when the data set is there.

    Args:
      parts: their folders, in any order; they and the data set may be in buckets, and shards are copied within these.
      out: folder of the data set.
      error_budget: fraction of all jobs that may be corrupt; that of the build if None.
      overwrite: replace a data set at `out`.

    Raises:
      ValueError: parts of different builds, a part twice, missing or not finished, or `out` exists. Nothing is changed.
      BuildError: more corrupt inputs than the budget allows.
    """
    began = time.perf_counter()
    target = out_folder(out)
    check_out(target, overwrite)
    info, units = checked_parts([absolute(part) for part in parts])
    budget = info.error_budget if error_budget is None else error_budget
    return complete(target, info, units, budget, overwrite=overwrite, appends=False, began=began)


def append_parts(out: str | Path, parts: Sequence[str | Path], *, error_budget: float | None = None) -> Summary:
    """Add the parts of a build to a data set; arguments and errors as in `merge_parts`.

    Raises:
      ValueError: also for records that the data set has.
    """
    began = time.perf_counter()
    target = out_folder(out)
    info, units = checked_parts([absolute(part) for part in parts])
    budget = info.error_budget if error_budget is None else error_budget
    return complete(target, info, units, budget, overwrite=False, appends=True, began=began)


def complete(
    out: Path,
    info: BuildInfo,
    units: Sequence[tuple[Path, Done]],
    budget: float,
    *,
    overwrite: bool,
    appends: bool,
    began: float,
) -> Summary:
    """Publish finished units, and remove the folders that they were in."""
    done = [unit for _, unit in units]
    folders = list(dict.fromkeys(folder for folder, _ in units))
    _check_budget(done, info.jobs, budget, folders)
    with _staged(out) as staging:
        shards: dict[str, list[Any]] = {}
        for folder, unit in units:
            for name in unit.files:
                if is_remote(out):
                    shards.setdefault(unit.split, []).append(folder / name)
                    continue
                shards.setdefault(unit.split, []).append(linked(folder / name, staging / "shards"))
                linked(rows_path(folder / name), staging / "shards")
        log = "".join(log_line(item) for unit in done for item in unit.rejected)
        data = staging / "data"
        if appends:
            indices = _append(out, info, shards, log, data, parts=info.parts > 1)
        elif is_remote(out):
            check_out(out, overwrite)
            remove(out)
            data.mkdir()
            if log:
                (data / REJECTED_LOG).write_text(log)
            indices = publish_to_bucket(out, shards, data, description=info.description, metadata=info.metadata)
        else:
            indices = publish(data, shards, description=info.description, metadata=info.metadata,
                              name=dataset_info.identifier(out.name))  # fmt: skip
            if log:
                (data / REJECTED_LOG).write_text(log)
            move_to_out(data, out, overwrite)
    for folder in folders:
        remove(folder)
    size = sum(storage.size(path) for path in (*out.iterdir(), *out.glob("index-*/*")) if path.is_file())
    return summary_of(out, done, {split: index.digest for split, index in indices.items()}, size, began)


def check_alike(out: Path, added: dict[str, Any]) -> None:
    """Raise `ValueError` for latents or embeddings that were made otherwise than those of the data set."""
    there, added = read_metadata(out), json.loads(json.dumps(added))
    for name in ("latents", "text_embeddings"):
        before, now = there.get(name) or {}, added.get(name) or {}
        wrong = [key for key in before | now if before.get(key) != now.get(key)]
        if wrong:
            raise ValueError(
                f"{out}: cannot be appended to: {name}.{wrong[0]} is {before.get(wrong[0])!r} in it and "
                f"{now.get(wrong[0])!r} in what is added. Make both with the same, or append to another data set."
            )


def joined_digests(before: Mapping[str, str], added: Mapping[str, str]) -> dict[str, str]:
    """Digests by split of what a data set was made of, when records of another source are added to it."""
    both = {split: f"{before[split]} {added[split]}" for split in before.keys() & added.keys()}
    return {**before, **added} | {split: hashlib.sha256(text.encode()).hexdigest() for split, text in both.items()}


def _append(
    out: Path, info: BuildInfo, shards: dict[str, list[Any]], log: str, draft: LocalPath, parts: bool
) -> dict[str, Any]:
    check_alike(out, info.metadata)
    metadata = read_metadata(out)
    added = {"origin": info.metadata.get("origin"), "options": info.metadata.get("options", {})}
    # What a data set that is derived from another one was made of, is that of now.
    derived = {name: info.metadata[name] for name in ("source_digests", "address") if name in info.metadata}
    if parts and "source_digests" in derived:
        derived["source_digests"] = joined_digests(metadata.get("source_digests") or {}, derived["source_digests"])
    metadata = {**metadata, **derived, "appended": [*metadata.get("appended", []), added]}
    if is_remote(out):
        draft.mkdir()
        indices = append_in_bucket(out, shards, draft, metadata=metadata)
    else:
        indices = append(LocalPath(out), shards, metadata=metadata)
    if log:
        with storage.appending(out / REJECTED_LOG) as file:
            file.write(log)
    return indices


@contextlib.contextmanager
def _staged(out: Path) -> Iterator[LocalPath]:
    """An empty folder for what becomes the data set, or part of it, while no other process writes there."""
    folder = beside(out) / f".{out.name}.publishing"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, f"{out}: another process is writing this data set; wait for it, then run the command again."):
        for name in ("shards", "data"):
            remove(folder / name)
        (folder / "shards").mkdir()
        try:
            yield folder
        finally:
            remove(folder)


def beside(out: Path) -> LocalPath:
    return LocalPath(tempfile.gettempdir()) if is_remote(out) else LocalPath(out.parent)


def _check_budget(done: Sequence[Done], total: int, budget: float, folders: Sequence[Path]) -> None:
    rejected = [item for unit in done for item in unit.rejected]
    written = any(unit.kinds for unit in done)
    corrupt = [item for item in rejected if item.corrupt]
    lines = "".join(f"\n  {item.name}: {item.reason}" for item in (corrupt if written else rejected))
    kept = "nothing was written"
    if is_worth_keeping(done):
        kept = f"no data set was written; what is finished is kept in {', '.join(map(str, folders))}"
    if len(corrupt) > budget * total:
        raise BuildError(
            f"{len(corrupt)} of {total} files cannot be used, more than the budget of {budget:.1%} "
            f"(error_budget); {kept}:{lines}"
        )
    if not written:
        for folder in folders:
            remove(folder)
        raise BuildError(f"none of {total} files can be used; nothing was written:{lines}")
