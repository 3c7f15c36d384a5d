"""Files that grow while a run writes them: written locally, uploaded at intervals."""

import pathlib
import shutil
import tempfile
import threading
from collections.abc import Callable

from jvgen.storage import files
from jvgen.storage.errors import StorageError
from jvgen.storage.paths import Path, is_remote

# A bucket has no append: each upload writes the whole file again.
INTERVAL = 60.0


class Mirror:
    """A local file or folder that is uploaded when it changed: every `interval` seconds, by `sync` and by `close`.

    For a local `path` nothing is copied: `local` is `path`.

    Args:
      path: where it belongs.
      interval: seconds between uploads.
      log: takes a warning when an upload fails; it is tried again at the next interval.
    """

    def __init__(self, path: Path, *, interval: float = INTERVAL, log: Callable[[str], None] = print):
        self.path, self.local, self._folder = path, path, None
        self._log, self._interval = log, interval
        if not is_remote(path):
            return
        self._folder = pathlib.Path(tempfile.mkdtemp(prefix="jvgen-"))
        self.local = self._folder / path.name
        self._uploaded: dict[pathlib.Path, tuple[int, int]] = {}
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"upload-{path.name}", daemon=True)
        self._thread.start()

    def sync(self) -> bool:
        """Upload what changed now; returns False, after a warning, if the bucket cannot be written."""
        if self._folder is None:
            return True
        with self._lock:
            try:
                for file in sorted(self._folder.rglob("*")):
                    if file.is_file():
                        self._upload(file)
            except StorageError as error:
                self._log(f"WARNING: {error} The local copy is {self.local}; the upload is tried again.")
                return False
            return True

    def close(self) -> None:
        """Upload what changed and stop; the local files are removed if that succeeds."""
        if self._folder is None or self._closed.is_set():
            return
        self._closed.set()
        self._thread.join()
        if self.sync():
            shutil.rmtree(self._folder, ignore_errors=True)

    def _upload(self, file: pathlib.Path) -> None:
        stat = file.stat()
        state = (stat.st_size, stat.st_mtime_ns)
        if self._uploaded.get(file) != state:
            # A snapshot: the file may grow while it is uploaded.
            files.write_bytes(self.path.parent / file.relative_to(self._folder).as_posix(), file.read_bytes())
            self._uploaded[file] = state

    def _run(self) -> None:
        while not self._closed.wait(self._interval):
            self.sync()
