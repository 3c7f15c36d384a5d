"""The barriers of background saves: if one process cannot write its part, the others do not wait for it.

Orbax ends a save with barriers: everybody has written, process 0 has committed, the save is over. A process that fails
goes to the last one at once. With barriers of JAX's store the others would wait until a time limit, and then report
that limit and not the cause.
"""

import collections
import time
from typing import ClassVar

from jvgen.parallel import processes

# Seconds for which a save may take.
SAVE_SECONDS = 7200
# In the names of the barriers that a failing process leaves out.
_LEFT_OUT = ("async_write_complete", "async_commit_complete")
# Seconds between looks at the store, from the first to later ones.
_FIRST, _LONGEST = 0.01, 0.5


class FailedElsewhere(RuntimeError):
    """Another process could not write its part of a checkpoint."""


class SaveBarrier:
    """A function for `orbax.checkpoint.AsyncOptions.barrier_sync_fn`; all processes of a run make one each."""

    # Of all instances, because notes of an earlier one stay in the store: how often this process came to a barrier that
    # nobody leaves out, and the latest barriers that it has passed.
    _common: ClassVar[int] = 0
    _passed: ClassVar[collections.deque[str]] = collections.deque(maxlen=8)

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Wait until all processes are at the barrier of this key.

        Raises:
          FailedElsewhere: another process has left this barrier out.
          TimeoutError: not all came in time.
        """
        if processes.count() == 1:
            return
        if not _may_be_left_out(key):
            SaveBarrier._common += 1
        barrier = f"saves/{key}/{self._common}"
        processes.note(barrier)
        processes.note("saves/at", barrier, overwrite=True)
        end, pause = time.monotonic() + timeout_ms / 1000, _FIRST
        while len(arrived := processes.notes(barrier)) < processes.count():
            if _may_be_left_out(key):
                self._check_others(barrier)
            if time.monotonic() > end:
                absent = sorted(set(range(processes.count())) - arrived.keys())
                raise TimeoutError(f"{key}: processes {absent} did not arrive within {timeout_ms / 1000:g} s")
            time.sleep(pause)
            pause = min(1.5 * pause, max(_LONGEST, processes.count() / 200))
        if self._passed:
            # Everybody is here, so nobody waits there.
            processes.remove_note(self._passed[-1])
        self._passed.append(barrier)

    def _check_others(self, barrier: str) -> None:
        for number, place in processes.notes("saves/at").items():
            ahead = not _may_be_left_out(place) and place not in self._passed
            # It may have come here, and gone on, since the last look.
            if ahead and number not in processes.notes(barrier):
                raise FailedElsewhere(f"process {number} could not write its part")


def _may_be_left_out(name: str) -> bool:
    return any(part in name for part in _LEFT_OUT)
