"""The lock of a run directory: two starts of a run do not write to it at the same time.

`lock.json` says who holds the directory, with a random token; `lock_heartbeat.json` is rewritten while the run lives. A
holder that was taken for dead finds another token before its next save, and stops. Plain files are enough for that, so
it works on shared disks and on object storage.
"""

import contextlib
import datetime
import json
import os
import pathlib
import secrets
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from jvgen import exit_codes, storage
from jvgen.config import ConfigError
from jvgen.parallel import failing, processes
from jvgen.storage import Path

LOCK, HEARTBEAT = "lock.json", "lock_heartbeat.json"
# Seconds between heartbeats, and without one after which a holder on another machine counts as dead.
BEAT_SECONDS, LEASE_SECONDS = 10.0, 60.0


class LockLost(RuntimeError):
    """Another start of the run has taken over the run directory."""

    exit_code = exit_codes.USER_ERROR


class RunLock:
    """The lock of a run directory, held by process 0 for all processes of the run.

    Attributes:
      token: of this start; every process of the run has the same one.
    """

    def __init__(self, workdir: Path, token: str):
        self.token = token
        self._path, self._heartbeat = workdir / LOCK, workdir / HEARTBEAT
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def check(self) -> None:
        """Raise `LockLost` if another start has taken the run directory. For process 0, before it writes."""
        holder = _read(self._path)
        if holder is None or holder.get("token") != self.token:
            now = "nobody" if holder is None else _describe(holder)
            raise LockLost(
                f"{self._path.parent} is no longer held by this run but by {now}. This process was taken for dead, or "
                "the lock was removed; it stops without writing, so that the other one can continue."
            )

    def start_heartbeat(self) -> None:
        """Keep the lock alive, on a thread."""
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Remove the lock, if it is still held."""
        self._closed.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with contextlib.suppress(OSError, LockLost):
            self.check()
            self._heartbeat.unlink(missing_ok=True)
            self._path.unlink(missing_ok=True)

    def _beat(self) -> None:
        count = 0
        while not self._closed.wait(BEAT_SECONDS):
            count += 1
            # Storage that is away for a moment is no reason to end: the lock is checked before every save.
            with contextlib.suppress(OSError, LockLost):
                self.check()
                _write(self._heartbeat, {"token": self.token, "count": count})


@contextlib.contextmanager
def held(workdir: Path, log: Callable[[str], None]) -> Iterator[RunLock]:
    """Context that holds the lock of a run directory, for all processes of the run.

    A lock whose holder is dead is taken over: at once if it was on this machine, otherwise after a minute without a
    heartbeat.

    Raises:
      ConfigError: on all processes, if another start of the run is alive; the message names it.
    """
    found: list[str] = []
    token = ""
    if processes.index() == 0:
        try:
            token = _acquire(workdir, log)
        except ConfigError as error:
            found = [str(error)]
    token, found = processes.broadcast([token, found], "run directory lock")
    if found:
        raise ConfigError(found[0])
    lock = RunLock(workdir, token)
    if processes.index() != 0:
        yield lock
        return
    lock.start_heartbeat()
    try:
        with failing.before_exit(lock.release):
            yield lock
    finally:
        lock.release()


def read_token(workdir: Path) -> str:
    """The token in the lock file as this process sees it; "none" on a disk that process 0 does not write to."""
    for _ in range(10):
        holder = _read(workdir / LOCK)
        if holder is not None:
            return str(holder.get("token"))
        # Shared file systems show new files with a delay.
        time.sleep(0.5 if processes.count() > 1 else 0.0)
    return "none"


def _acquire(workdir: Path, log: Callable[[str], None]) -> str:
    """Write the lock file and return its token."""
    path = workdir / LOCK
    holder = _read(path)
    if holder is not None and _alive(holder, workdir, log):
        raise ConfigError(
            f"run directory {workdir} is in use by {_describe(holder)}. Wait for it, stop it, or use another run "
            f"directory; if you are sure that it is gone, remove {path}."
        )
    if holder is not None:
        log(f"taking over the run directory from {_describe(holder)}, which has ended without releasing it")
    token = secrets.token_hex(8)
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    mine = {"token": token, "host": socket.gethostname(), "pid": os.getpid(), "started": started}
    _write(path, mine | {"machine": _machine(), "birth": _birth(os.getpid()), "command": shlex.join(sys.argv)[:500]})
    return token


def _alive(holder: dict[str, Any], workdir: Path, log: Callable[[str], None]) -> bool:
    if holder.get("machine") == _machine():
        # A number that another process has got by now does not count.
        return holder.get("pid") != os.getpid() and _birth(int(holder["pid"])) == holder.get("birth") is not None
    before = _read(workdir / HEARTBEAT)
    log(f"the run directory is held by {_describe(holder)}: looking for a sign of life for up to {LEASE_SECONDS:.0f} s")
    end = time.monotonic() + LEASE_SECONDS
    while time.monotonic() < end:
        time.sleep(min(2.0, LEASE_SECONDS / 10))
        now = _read(workdir / LOCK)
        if now is None:
            return False
        # Comparing what is written needs no clocks that agree.
        if _read(workdir / HEARTBEAT) != before or now.get("token") != holder.get("token"):
            return True
    return False


def _machine() -> str:
    """Differs between machines, boots and containers: where it is equal, process ids can be compared."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _birth(pid: int) -> str | None:
    """When a process of this machine started, in clock ticks since the boot; None if there is none."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]


def _describe(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid')} on {holder.get('host')}, started {holder.get('started')}"


def _write(path: Path, content: dict[str, Any]) -> None:
    storage.write_text(path, json.dumps(content))


def _read(path: Path) -> dict[str, Any] | None:
    """The content of a file; None if there is none. Storage that is away for a moment is an error, not a lost lock."""
    try:
        content = json.loads(storage.read_text(path))
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None
