"""Writes a TFDS data set in ArrayRecord atomically, without TensorFlow."""

import contextlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jvgen
from jvgen.data.store import records
from jvgen.data.store.index import COLUMNS, Index, checksum_of, describe
from jvgen.data.store.records import Record
from jvgen.data.store.sources import METADATA
from jvgen.storage import absolute, is_remote, remove_tree, upload_folder

FORMAT = 1  # of jvgen's own files; incremented when older readers cannot read them
VERSION = "1.0.0"  # required by TFDS
MODULE = "jvgen.data.writer"  # recorded by TFDS; constant, so that moving this file does not change data sets
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
          ValueError: `out` exists and may not be replaced.
        """
        self.out = absolute(out)
        self.description = description
        self.metadata = dict(metadata or {})
        self.overwrite = overwrite
        self.shard_bytes = shard_bytes
        self._check_out()
        parent = Path(tempfile.gettempdir()) if is_remote(self.out) else self.out.parent
        self._partial = parent / f".{self.out.name}.partial-{socket.gethostname()}-{os.getpid()}"
        self._splits: dict[str, _Split] = {}
        self.digests: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._remove_dead_builds()
        self._partial.mkdir(parents=True)
        return self

    def add(self, split: str, record: Record) -> None:
        """Append a record to a split.

        Raises:
          ValueError: inconsistent fields, or an id that the split already has.
        """
        record.validate()
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
        import tensorflow_datasets as tfds

        if not self._splits:
            raise ValueError(f"{self.out}: nothing to write, no record was accepted.")
        name = _identifier(self.out.name)
        infos = []
        for split in self._splits.values():
            lengths, size = split.close(name)
            index = Index.of_columns(split.columns)
            index.save(self._partial, split.name)
            self.digests[split.name] = index.digest
            template = tfds.core.ShardedFileTemplate(
                data_dir=self._partial, dataset_name=name, split=split.name, filetype_suffix="array_record"
            )
            infos.append(
                tfds.core.SplitInfo(name=split.name, shard_lengths=lengths, num_bytes=size, filename_template=template)
            )
        metadata = {"format": FORMAT, "jvgen": jvgen.__version__, **self.metadata, "digests": self.digests}
        (self._partial / METADATA).write_text(json.dumps(metadata, indent=1) + "\n")
        identity = tfds.core.dataset_info.DatasetIdentity(
            name=name, version=tfds.core.Version(VERSION), data_dir=str(self._partial), module_name=MODULE
        )
        info = tfds.core.DatasetInfo(
            builder=identity, description=self.description, features=records.features(), disable_shuffling=True
        )
        info.set_file_format("array_record")
        info.set_splits(tfds.core.SplitDict(infos))
        info.write_to_directory(self._partial)
        _fsync(self._partial)
        self._move_to_out()

    def _move_to_out(self) -> None:
        self._check_out()
        if is_remote(self.out):
            remove_tree(self.out)
            upload_folder(self._partial, self.out, last=("dataset_info.json",))
            return
        replaced = None
        if self.out.exists():
            replaced = self.out.parent / f"{self._partial.name}.replaced"
            self.out.rename(replaced)
        self._partial.rename(self.out)
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)

    def _check_out(self) -> None:
        out = self.out
        if out.is_file():
            raise ValueError(f"out = {str(out)!r} is a file; use a folder that does not exist yet.")
        if not out.is_dir() or not any(out.iterdir()):
            return
        if not (out / "dataset_info.json").is_file():
            raise ValueError(f"out = {str(out)!r} contains something other than a data set; use another folder.")
        if not self.overwrite:
            raise ValueError(
                f"out = {str(out)!r} already contains a data set; pass --overwrite, or use another folder."
            )

    def _remove_dead_builds(self) -> None:
        prefix = f".{self.out.name}.partial-{socket.gethostname()}-"
        for folder in self._partial.parent.glob(f"{prefix}*"):
            process = folder.name.removeprefix(prefix).split(".")[0]
            if process.isdigit() and (int(process) == os.getpid() or not _alive(int(process))):
                shutil.rmtree(folder, ignore_errors=True)


class _Split:
    """The shards of a split while they are written."""

    def __init__(self, name: str, folder: Path):
        self.name = name
        self.folder = folder
        self.columns: dict[str, list] = {column: [] for column in COLUMNS}
        self.ids: set[str] = set()
        self.lengths: list[int] = []
        self.bytes = 0
        self.shard_bytes = 0
        self.shard: Any = None

    def add(self, record: Record, limit: int) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        if record.id in self.ids:
            raise ValueError(f"record id {record.id!r} occurs twice in split {self.name!r}; ids must be unique.")
        serialized = records.features().serialize_example(records.encode(record))
        if self.shard is None:
            # Media are already compressed; groups of one record give the fastest random access.
            self.shard = ArrayRecordWriter(str(self._path(len(self.lengths))), "group_size:1,uncompressed")
            self.lengths.append(0)
        self._guarded(self.shard.write, serialized)
        self.ids.add(record.id)
        for column, value in describe(record, checksum_of(serialized)).items():
            self.columns[column].append(value)
        self.lengths[-1] += 1
        self.bytes += len(serialized)
        self.shard_bytes += len(serialized)
        if self.shard_bytes >= limit:
            self._close_shard()

    def close(self, dataset: str) -> tuple[list[int], int]:
        """Close the files and give them their final names; returns the records per shard and the total bytes."""
        self._close_shard()
        for number in range(len(self.lengths)):
            name = f"{dataset}-{self.name}.array_record-{number:05d}-of-{len(self.lengths):05d}"
            self._path(number).rename(self.folder / name)
        return self.lengths, self.bytes

    def abandon(self) -> None:
        """Close a file that is about to be removed, ignoring errors."""
        if self.shard is not None:
            with contextlib.suppress(RuntimeError):
                self.shard.close()
            self.shard = None

    def _guarded(self, action: Callable[..., object], *arguments: object) -> None:
        try:
            action(*arguments)
        except RuntimeError as error:
            raise OSError(f"{self.folder}: cannot write ({error}).") from error

    def _close_shard(self) -> None:
        if self.shard is None:
            return
        self._guarded(self.shard.close)
        self.shard = None
        path = self._path(len(self.lengths) - 1)
        # ArrayRecord does not always report a full disk: a file smaller than its records is incomplete.
        if path.stat().st_size < self.shard_bytes:
            raise OSError(
                f"{path}: {path.stat().st_size} bytes on disk of {self.shard_bytes} written; is the disk full?"
            )
        self.shard_bytes = 0

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.name}-{number:05d}.writing"


def _identifier(name: str) -> str:
    """A TFDS data set name: lower-case words joined by underscores, starting with a letter."""
    text = "".join(c.lower() if c.isascii() and c.isalnum() else "_" for c in name).strip("_") or "dataset"
    return text if text[0].isalpha() else f"dataset_{text}"


def _fsync(folder: Path) -> None:
    """Flush all files of a folder to disk, so that after a crash a renamed folder has no half-written files."""
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
