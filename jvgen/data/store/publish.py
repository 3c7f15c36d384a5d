"""Makes a data set of shards, or adds shards to one: files are moved, columns written, and one rename commits each."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jvgen
from jvgen import storage
from jvgen.data.store import dataset_info
from jvgen.data.store.index import Index, ShardInfo
from jvgen.data.store.index_files import IndexDraft, checksums_are_of_content, draft_index, load_index
from jvgen.data.store.shard_writer import read_shard, rows_path
from jvgen.data.store.sources import METADATA

FORMAT = 2  # of jvgen.json; incremented when older readers cannot read a data set


def publish(
    folder: Path,
    shards: Mapping[str, Sequence[Path]],
    *,
    description: str,
    metadata: Mapping[str, Any],
    name: str | None = None,
) -> dict[str, Index]:
    """Move complete shards into a local folder and make it a data set; returns the index of each split.

    A folder without `dataset_info.json`, which is written last, is no data set.

    Args:
      folder: of the data set, on the same file system as the shards; created if it does not exist.
      shards: files of `ShardWriter` by split, in the order of their records.
      description: one line.
      metadata: JSON values for `jvgen.json` (origin, options, digests).
      name: TFDS name of the data set; made of the folder's if None.

    Raises:
      ValueError: a shard that is incomplete or damaged, an id that occurs twice in a split, a column with numbers in
        some shards and texts in others, a folder that is a data set.
    """
    if (folder / dataset_info.NAME).is_file():
        raise ValueError(f"{folder}: already a data set; use append, or another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    dataset = name or dataset_info.identifier(folder.name)
    indices = _add(folder, dataset, shards, {})
    _finish(folder, dataset, description, metadata, indices)
    return indices


def append(folder: Path, shards: Mapping[str, Sequence[Path]], *, metadata: Mapping[str, Any]) -> dict[str, Index]:
    """Add complete shards behind those that a local data set has, which are neither read nor changed.

    Each split is committed by one rename: a data set whose append was killed is what it was before, or has the split's
    new records, and the same call again completes it. Runs on the data set go on, but do not resume from their
    checkpoints: it has other records.

    Args:
      shards: as `publish`; splits that the data set does not have are added.
      metadata: of the whole data set, for `jvgen.json`.

    Raises:
      ValueError: as `publish`; a data set of 0.1.0.
    """
    indices = _indices_to_extend(folder)
    shards = _uncommitted(folder, shards, indices)
    dataset = storage.read_json_object(folder / dataset_info.NAME)["name"]
    indices |= _add(folder, dataset, shards, indices)
    _finish(folder, dataset, dataset_info.description(folder), metadata, indices)
    return indices


def publish_to_bucket(
    out: storage.Path,
    shards: Mapping[str, Sequence[storage.Path]],
    draft: Path,
    *,
    description: str,
    metadata: Mapping[str, Any],
) -> dict[str, Index]:
    """As `publish`, into an empty folder of a bucket, with shards on local disks or in buckets, which are copied.

    Args:
      out: of the data set.
      shards: as `publish`.
      draft: an empty local folder, in which everything but the shards is written before it is uploaded.
      description, metadata: as `publish`.
    """
    dataset = dataset_info.identifier(out.name)
    indices = _add_to_bucket(out, draft, dataset, shards, {})
    _finish(draft, dataset, description, metadata, indices)
    _upload(draft, out)
    return indices


def append_in_bucket(
    out: storage.Path,
    shards: Mapping[str, Sequence[storage.Path]],
    draft: Path,
    *,
    metadata: Mapping[str, Any],
) -> dict[str, Index]:
    """As `append`, to a data set in a bucket, of which the index is read; arguments as in `publish_to_bucket`.

    Each split is committed by writing one file. Nobody else may write the data set meanwhile.
    """
    indices = _indices_to_extend(out)
    shards = _uncommitted(out, shards, indices)
    dataset = storage.read_json_object(out / dataset_info.NAME)["name"]
    indices |= _add_to_bucket(out, draft, dataset, shards, indices)
    _finish(draft, dataset, dataset_info.description(out), metadata, indices)
    _upload(draft, out)
    for split in shards:
        used = {path.name for path in (draft / f"index-{split}").iterdir()}
        for path in (out / f"index-{split}").iterdir():
            if path.name not in used:
                path.unlink()
    return indices


def upgrade(folder: Path) -> dict[str, Index]:
    """Write indices in the present format beside those of 0.1.0, with the same digests, so that runs resume."""
    indices = {}
    for split, info in dataset_info.read(folder).items():
        index = load_index(folder, split)
        if not index.shards:
            starts = [sum(shard.records for shard in info.shards[:n]) for n in range(len(info.shards))]
            digests = [
                index.take(slice(start, start + shard.records)).digest
                for start, shard in zip(starts, info.shards, strict=True)
            ]
            files = [
                ShardInfo(shard.file, shard.records, storage.size(folder / shard.file), digest)
                for shard, digest in zip(info.shards, digests, strict=True)
            ]
            index = draft_index(folder, split, [index], files, checksums="serialized").commit()
        indices[split] = index
    return indices


def _indices_to_extend(folder: storage.Path) -> dict[str, Index]:
    indices = {split: load_index(folder, split) for split in dataset_info.read(folder)}
    for split, index in indices.items():
        if not index.shards:
            raise ValueError(f"{folder} [{split}]: its index is of 0.1.0; run `jvgen data upgrade {folder}` first.")
    return indices


def _uncommitted(
    folder: storage.Path, shards: Mapping[str, Sequence[storage.Path]], indices: Mapping[str, Index]
) -> dict[str, Sequence[storage.Path]]:
    """Without the shards that an append has committed which was killed before it wrote `dataset_info.json`."""
    recorded = dataset_info.read(folder)
    behind = {split: index.shards[len(recorded[split].shards) :] for split, index in indices.items()}
    committed = {split: {shard.digest for shard in found} for split, found in behind.items() if found}
    left = {
        split: [path for path in paths if read_shard(path).index.digest not in committed[split]]
        if split in committed
        else paths
        for split, paths in shards.items()
    }
    return {split: paths for split, paths in left.items() if paths}


def _add(
    folder: Path, dataset: str, shards: Mapping[str, Sequence[Path]], old: Mapping[str, Index]
) -> dict[str, Index]:
    drafts, names = _drafts(folder, dataset, shards, old)
    # The shards stay where they are until the index names them: if this is killed, it can be done again.
    for path, name in names.items():
        _link(path, folder / name)
    indices = {draft.split: draft.commit() for draft in drafts}
    for path in names:
        path.unlink(missing_ok=True)
        rows_path(path).unlink(missing_ok=True)
    return indices


def _add_to_bucket(
    out: storage.Path,
    draft: Path,
    dataset: str,
    shards: Mapping[str, Sequence[storage.Path]],
    old: Mapping[str, Index],
) -> dict[str, Index]:
    drafts, names = _drafts(draft, dataset, shards, old)
    for path, name in names.items():
        storage.copy_file(path, out / name)
    return {draft.split: draft.commit() for draft in drafts}


def _upload(draft: Path, out: storage.Path) -> None:
    """Columns, then the indices that name them, then the file without which a folder is no data set."""

    def rank(path: Path) -> tuple[bool, bool, str]:
        return path.name == dataset_info.NAME, path.parent == draft and path.name.startswith("index-"), path.name

    for path in sorted((path for path in draft.rglob("*") if path.is_file()), key=rank):
        storage.copy_file(path, out / path.relative_to(draft).as_posix())


def _drafts(
    folder: Path, dataset: str, shards: Mapping[str, Sequence[storage.Path]], old: Mapping[str, Index]
) -> tuple[list[IndexDraft], dict[storage.Path, str]]:
    """Indices that are not committed, and the names of the shards in the data set."""
    drafts: list[IndexDraft] = []
    names: dict[storage.Path, str] = {}
    for split, paths in shards.items():
        before = old.get(split)
        files = list(before.shards) if before is not None else []
        for number, path in enumerate(paths, len(files)):
            shard = read_shard(path)
            name = dataset_info.shard_name(dataset, split, number)
            files.append(ShardInfo(name, len(shard.index), shard.bytes, shard.index.digest))
            names[path] = name
        of_content = before is None or checksums_are_of_content(before)
        checksums = "content" if of_content else "serialized"
        drafts.append(draft_index(folder, split, _pieces(before, paths), files, checksums))
    return drafts, names


def _pieces(before: Index | None, paths: Sequence[storage.Path]) -> Iterator[Index]:
    if before is not None:
        yield before
    for path in paths:
        yield read_shard(path).index


def _link(path: Path, target: Path) -> None:
    """Make a file that is not part of any index appear under another name, too."""
    # Of an append that was killed before it was committed.
    target.unlink(missing_ok=True)
    try:
        os.link(path, target)
    except OSError:
        path.rename(target)  # a file system without links


def _finish(
    folder: Path, dataset: str, description: str, metadata: Mapping[str, Any], indices: Mapping[str, Index]
) -> None:
    digests = {split: index.digest for split, index in indices.items()}
    document = {"format": FORMAT, "jvgen": jvgen.__version__, **metadata, "digests": digests}
    storage.write_text(folder / METADATA, json.dumps(document, indent=1) + "\n")
    splits = {
        split: dataset_info.Split(index.shards, sum(shard.bytes for shard in index.shards))
        for split, index in indices.items()
    }
    dataset_info.write(folder, dataset, description, splits)
    for path in (folder / dataset_info.NAME, folder / "features.json", folder):
        _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
