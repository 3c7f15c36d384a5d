"""Writes a TFDS data set in ArrayRecord atomically, without TensorFlow."""

import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from jvgen.data.store import dataset_info
from jvgen.data.store.out_folder import check_out, move_to_out, out_folder
from jvgen.data.store.publish import publish
from jvgen.data.store.records import Record
from jvgen.data.store.shard_writer import ShardWriter
from jvgen.storage import is_remote, partial_folder, remove_dead_partials

SHARD_BYTES = 512 << 20


class Writer:
    """Context manager that writes records to a hidden folder and renames it at the end.

    A data set in a bucket is written to a temporary folder of this machine (`TMPDIR` says where) and uploaded at the
    end, `dataset_info.json` last: without that file the folder is no data set.

    A build that fails is removed. One that is killed leaves a folder whose name starts with a dot, which the next build
    of the same name removes. Records keep the order in which they are added.
    """

    def __init__(
        self,
        out: str | Path,
        *,
        description: str,
        metadata: dict[str, Any] | None = None,
        overwrite: bool = False,
        shard_bytes: int = SHARD_BYTES,
    ):
        """Check that the data set can be written.

        Args:
          out: folder of the data set; must not exist or be empty, unless `overwrite`.
          description: one line for `dataset_info.json`.
          metadata: JSON values stored in `jvgen.json` (origin, options, digests).
          overwrite: replace an existing data set. A folder with anything else is never replaced.
          shard_bytes: size at which a new ArrayRecord file is started.

        Raises:
          ValueError: `out` exists and may not be replaced, or is a mount point.
        """
        self.out = out_folder(out)
        self.description = description
        self.metadata = dict(metadata or {})
        self.overwrite = overwrite
        self.shard_bytes = shard_bytes
        check_out(self.out, overwrite)
        parent = Path(tempfile.gettempdir()) if is_remote(self.out) else self.out.parent
        self._partial = partial_folder(parent / self.out.name)
        self._splits: dict[str, _Split] = {}
        self.digests: dict[str, str] = {}

    def __enter__(self) -> Self:
        remove_dead_partials(self._partial.with_name(self.out.name))
        self._partial.mkdir(parents=True)
        return self

    def add(self, split: str, record: Record) -> None:
        """Append a record to a split.

        Raises:
          ValueError: inconsistent fields, or an id that the split already has.
        """
        if split not in self._splits:
            self._splits[split] = _Split(split, self._partial)
        self._splits[split].add(record, self.shard_bytes)

    def attach(self, name: str, text: str) -> None:
        """Add a text file to the folder of the data set."""
        (self._partial / name).write_text(text)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            for split in self._splits.values():
                split.abandon()
            shutil.rmtree(self._partial, ignore_errors=True)

    def _finish(self) -> None:
        if not self._splits:
            raise ValueError(f"{self.out}: nothing to write, no record was accepted.")
        shards = {split.name: split.close() for split in self._splits.values()}
        name = dataset_info.identifier(self.out.name)
        indices = publish(self._partial, shards, description=self.description, metadata=self.metadata, name=name)
        self.digests = {split: index.digest for split, index in indices.items()}
        move_to_out(self._partial, self.out, self.overwrite)


class _Split:
    """The shards of a split while they are written."""

    def __init__(self, name: str, folder: Path):
        self.name = name
        self._folder = folder
        self._ids: set[str] = set()
        self._paths: list[Path] = []
        self._shard: ShardWriter | None = None

    def add(self, record: Record, limit: int) -> None:
        if record.id in self._ids:
            raise ValueError(f"record id {record.id!r} occurs twice in split {self.name!r}; ids must be unique.")
        if self._shard is None:
            self._paths.append(self._folder / f"{self.name}-{len(self._paths):05d}.writing")
            self._shard = ShardWriter(self._paths[-1])
        self._shard.add(record)
        self._ids.add(record.id)
        if self._shard.bytes >= limit:
            self._close_shard()

    def close(self) -> list[Path]:
        """The files of the split, complete."""
        self._close_shard()
        return self._paths

    def abandon(self) -> None:
        """Close a file that is about to be removed, ignoring errors."""
        if self._shard is not None:
            self._shard.abandon()

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self._shard = None
