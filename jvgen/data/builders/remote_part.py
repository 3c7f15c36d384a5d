"""A part of a build in a bucket: finished units are uploaded one by one, so that any machine can go on with it."""

import json
import os
import platform
import uuid
from collections.abc import Sequence
from pathlib import Path as LocalPath

from jvgen import storage
from jvgen.data.builders.build_folder import DESCRIPTION, BuildInfo, difference, finished, read_info
from jvgen.data.builders.units import Done, forget, read_done, unit_path
from jvgen.data.store.shard_writer import rows_path
from jvgen.storage import Path

OWNER = "owner.json"


class RemotePart:
    """The folder of a part in a bucket, beside the local one in which its units are made.

    Buckets have no locks. Whoever builds the part last has it: a process before finds that out when it has made its
    next unit, and ends.

    Args:
      remote: its folder.
      local: where units are made.
      info: what is being built.
    """

    def __init__(self, remote: Path, local: LocalPath, info: BuildInfo):
        self.remote, self._local, self._info = remote, local, info
        self._owner = {"machine": platform.node(), "process": os.getpid(), "id": uuid.uuid4().hex}

    def fetch(self, restart: bool) -> None:
        """Take over the part, and the units that are finished; their shards stay in the bucket.

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
            storage.write_text(self.remote / OWNER, json.dumps(self._owner))
            storage.copy_file(self._local / DESCRIPTION, self.remote / DESCRIPTION)
            self._forget_lost(set())
            return
        storage.write_text(self.remote / OWNER, json.dumps(self._owner))
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
        """Upload a unit and remove its shards here. It is finished there when its JSON file is, the last one.

        Raises:
          ValueError: another process has taken over the part.
        """
        self._check_owner()
        path = unit_path(self._local, done.number)
        kept = set()
        for name in done.files:
            for file in (self._local / name, rows_path(self._local / name)):
                storage.copy_file(file, self.remote / file.name)
                kept.add(file.name)
            (self._local / name).unlink()
        self._check_owner()
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

    def close(self) -> None:
        """Nobody builds it any more."""
        self._check_owner()
        (self.remote / OWNER).unlink()

    def _check_owner(self) -> None:
        try:
            owner = json.loads(storage.read_text(self.remote / OWNER))
        except FileNotFoundError:
            owner = None
        if owner != self._owner:
            by = f"process {owner['process']} on {owner['machine']}" if owner else "another process, which has finished"
            raise ValueError(
                f"{self.remote}: {by} has begun to build this part since, so this one ends. Start each part once; what "
                "is finished is kept."
            )

    def size(self) -> int:
        """Bytes in the bucket."""
        return sum(storage.size(path) for path in self.remote.iterdir())
