"""A part of a build in a bucket: finished units are uploaded one by one, so that any machine can go on with it."""

from collections.abc import Sequence
from pathlib import Path as LocalPath

from jvgen import storage
from jvgen.data.builders.build_folder import DESCRIPTION, BuildInfo, difference, finished, read_info
from jvgen.data.builders.units import Done, forget, read_done, unit_path
from jvgen.data.store.shard_writer import rows_path
from jvgen.storage import Path


class RemotePart:
    """The folder of a part in a bucket, beside the local one in which its units are made.

    Args:
      remote: its folder.
      local: where units are made.
      info: what is being built.
    """

    def __init__(self, remote: Path, local: LocalPath, info: BuildInfo):
        self.remote, self._local, self._info = remote, local, info

    def fetch(self, restart: bool) -> None:
        """Take over the units that are finished; their shards stay in the bucket.

        Raises:
          ValueError: the folder has another build.
        """
        before = read_info(self.remote)
        if before is not None and (before.identity != self._info.identity or before.parts != self._info.parts):
            if not restart:
                raise ValueError(
                    f"{self.remote} holds another build: {difference(before, self._info)}. Finish it with its own "
                    "options, or pass --restart to remove it."
                )
            before = None
        if before is None or restart:
            storage.remove_tree(self.remote)
            storage.copy_file(self._local / DESCRIPTION, self.remote / DESCRIPTION)
            self._forget_lost(set())
            return
        there = {path.name for path in self.remote.iterdir()}
        for number in self._info.numbers():
            path = unit_path(self._local, number)
            if path.name not in there or path.exists():
                continue
            unit = read_done(self.remote, number)
            for name in unit.files if unit is not None else ():
                rows = rows_path(self._local / name)
                storage.copy_file(self.remote / rows.name, rows)
            if unit is not None:
                storage.copy_file(self.remote / path.name, path)
        self._forget_lost(there)

    def _forget_lost(self, there: set[str]) -> None:
        """Units whose shards were uploaded to another folder, or removed in the bucket since, are not done."""
        for unit in finished(self._local, self._info):
            is_here = all((self._local / name).is_file() for name in unit.files)
            if not is_here and unit_path(self._local, unit.number).name not in there:
                forget(self._local, unit.number)

    def push(self, done: Done) -> None:
        """Upload a unit and remove its shards here. It is finished there when its JSON file is, the last one."""
        path = unit_path(self._local, done.number)
        kept = set()
        for name in done.files:
            for file in (self._local / name, rows_path(self._local / name)):
                storage.copy_file(file, self.remote / file.name)
                kept.add(file.name)
            (self._local / name).unlink()
        storage.copy_file(path, self.remote / path.name)
        # Of an attempt before, whose files could not be read.
        for old in self.remote.glob(f"{path.stem}-*"):
            if old.name not in kept:
                old.unlink()

    def push_missing(self, done: Sequence[Done]) -> None:
        """Upload units that were finished here before this process was killed."""
        for unit in done:
            if all((self._local / name).is_file() for name in unit.files):
                self.push(unit)

    def size(self) -> int:
        """Bytes in the bucket."""
        return sum(storage.size(path) for path in self.remote.iterdir())
