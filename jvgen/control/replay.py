"""Replay of an agent's experience: a ring of frames on disk, n-step transitions with frame stacks drawn from it.

A row is a frame with the action and the reward that led to it; an episode is a row without these (the frame of its
reset) and the rows after it. Frames are stored once, stacks are put together when they are drawn.
"""

import dataclasses
import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

HEADER = "replay.json"
FORMAT = 1
TRIES = 8
# Rows whose place on the disk is taken at a time.
TAKEN_AT_ONCE = 256
# In `places`: a row that was never written.
NO_EPISODE = -1


class Transitions(NamedTuple):
    """A batch of n-step transitions.

    Attributes:
      frames, next_frames: stacked along channels, oldest first: uint8 `B H W S*C`; the first frame of an episode stands
        in for those before it.
      actions: of the first step, float32 `B A`.
      rewards: discounted sum over n steps, float32 `B`.
      discounts: factor on the value of `next_frames`, float32 `B`.
    """

    frames: UInt8[np.ndarray, "B H W C"]
    actions: Float[np.ndarray, "B A"]
    rewards: Float[np.ndarray, "B"]
    discounts: Float[np.ndarray, "B"]
    next_frames: UInt8[np.ndarray, "B H W C"]


class Segments(NamedTuple):
    """A batch of consecutive rows, as recordings hold them.

    Attributes:
      frames: uint8 `B T H W C`.
      actions: taken at each frame, float32 `B T A`; zeros at the last frame of an episode.
      rewards: of these actions, float32 `B T`; zero at the last frame of an episode.
    """

    frames: UInt8[np.ndarray, "B T H W C"]
    actions: Float[np.ndarray, "B T A"]
    rewards: Float[np.ndarray, "B T"]


@dataclasses.dataclass(frozen=True)
class RowSpec:
    """What a row holds: the shape of a frame, and the components of an action."""

    frame: tuple[int, int, int]
    action_width: int


class ReplayRing:
    """A ring of rows in files that are mapped into memory; the oldest rows are overwritten.

    A run that is killed resumes at `rows_added` of its last checkpoint (`rewind`), or of the one before. Rows that were
    valid then are still there: the ring has `reserve` more than `capacity`, and not more than these are added from one
    `commit` to the next but one.

    Args:
      folder: of the files; created if it does not exist.
      spec: what a row holds.
      capacity: rows that are drawn from, at most.
      reserve: rows that may be added after the last `commit` but one.
      history: frames before the one in which an episode starts, which its first stacks show: episodes that a world
        model has imagined from recorded frames.

    Raises:
      ValueError: files of another spec or size; no rows.
      OSError: later, where a row is added and the disk is full.
    """

    def __init__(self, folder: str | Path, spec: RowSpec, capacity: int, *, reserve: int = 10_000, history: int = 0):
        if capacity < 2 or reserve < 1 or history < 0:
            raise ValueError(f"capacity = {capacity}, reserve = {reserve}: at least 2 and 1 rows.")
        self.history = history
        self.folder, self.spec, self.capacity, self.reserve = Path(folder), spec, capacity, reserve
        self.size = capacity + reserve
        header = {
            "format": FORMAT,
            "frame": list(spec.frame),
            "action_width": spec.action_width,
            "capacity": capacity,
            "reserve": reserve,
            **({"history": history} if history else {}),
        }
        file = self.folder / HEADER
        known = file.is_file()
        if known and (found := json.loads(file.read_text())) != header:
            raise ValueError(f"{self.folder}: a replay of {found}, not of {header}; give another folder.")
        self.folder.mkdir(parents=True, exist_ok=True)
        mode = "r+" if known else "w+"
        self._frames = self._map("frames", np.uint8, spec.frame, mode)
        self._actions = self._map("actions", np.float32, (spec.action_width,), mode)
        self._rewards = self._map("rewards", np.float32, (), mode)
        self._discounts = self._map("discounts", np.float32, (), mode)
        # The number of each row's episode, and its place in it, negative in its history.
        self._places = self._map("places", np.int64, (2,), mode)
        if not known:
            _take(self._places, 0, self.size)
            self._places[:] = NO_EPISODE
            # Last: without it the files are no replay.
            file.write_text(json.dumps(header))
        self.rows_added = self._committed = self._committed_before = 0
        self._episode, self._rows_on_disk = -1, 0

    def _map(self, name: str, dtype: type, shape: tuple[int, ...], mode: str) -> np.ndarray:
        path = self.folder / f"{name}.npy"
        if mode == "r+":
            return np.lib.format.open_memmap(path, mode)
        return np.lib.format.open_memmap(path, mode, dtype, (self.size, *shape))

    def __len__(self) -> int:
        """Rows that can be drawn from."""
        return min(self.rows_added, self.capacity)

    def begin(self, frame: UInt8[np.ndarray, "H W C"], history: Sequence[UInt8[np.ndarray, "H W C"]] = ()) -> None:
        """Start an episode with the frame of its reset.

        Args:
          frame: the first one from which an action was taken.
          history: the frames before it, oldest first, as many as the ring has.

        Raises:
          ValueError: another number of them.
        """
        if len(history) != self.history:
            raise ValueError(f"{len(history)} frames before the first one: this replay keeps {self.history}.")
        self._episode += 1
        for place, before in enumerate((*history, frame), -len(history)):
            self._add(before, np.zeros(self.spec.action_width, np.float32), 0.0, 1.0, place)

    def add(
        self, frame: UInt8[np.ndarray, "H W C"], action: Float[np.ndarray, "A"], reward: float, discount: float = 1.0
    ) -> None:
        """Add the frame that an action led to, its reward, and 0 as discount where the episode ended for good.

        Raises:
          ValueError: before `begin`, a frame or action of another shape, or numbers that are not finite.
        """
        if self._episode < 0:
            raise ValueError("add before begin: an episode starts with the frame of its reset.")
        if not (np.isfinite(action).all() and np.isfinite(reward) and np.isfinite(discount)):
            raise ValueError(f"action {action}, reward {reward}, discount {discount}: must be finite.")
        self._add(frame, action, reward, discount, int(self._places[(self.rows_added - 1) % self.size, 1]) + 1)

    def _add(self, frame: np.ndarray, action: np.ndarray, reward: float, discount: float, place: int) -> None:
        frame, action = np.asarray(frame), np.asarray(action, np.float32)
        if frame.shape != self.spec.frame or frame.dtype != np.uint8 or action.shape != (self.spec.action_width,):
            raise ValueError(
                f"frame {frame.dtype} {frame.shape}, action {action.shape}: this replay holds uint8 {self.spec.frame} "
                f"and ({self.spec.action_width},)."
            )
        if self.rows_added - self._committed_before >= self.reserve:
            raise ValueError(
                f"reserve = {self.reserve}: as many rows were added since the last checkpoint but one, and more would "
                "overwrite rows that a resumed run needs; save more often (checkpoint.every), or start a run with a "
                "larger reserve."
            )
        if self._rows_on_disk <= self.rows_added < self.size:
            self._take_space()
        row = self.rows_added % self.size
        self._frames[row], self._actions[row] = frame, action
        self._rewards[row], self._discounts[row] = reward, discount
        self._places[row] = self._episode, place
        self.rows_added += 1

    @property
    def _arrays(self) -> tuple[np.memmap, ...]:
        return self._frames, self._actions, self._rewards, self._discounts, self._places

    def _take_space(self) -> None:
        """Disk space for the next rows: a write to mapped memory on a full disk ends the process without a message."""
        first = self.rows_added
        count = min(TAKEN_AT_ONCE, self.size - first)
        self._rows_on_disk = first + count
        for array in self._arrays:
            try:
                _take(array, first, count)
            except OSError as error:
                self._rows_on_disk = 0
                raise OSError(
                    error.errno,
                    f"{self.folder}: the disk is full after {first:,} of {self.size:,} rows, which take "
                    f"{sum(other.nbytes for other in self._arrays) / 2**30:.1f} GiB together (task.replay_capacity and "
                    "replay_reserve); make space and start the run again",
                ) from error

    def commit(self) -> int:
        """Write all rows to disk; returns `rows_added`, to be saved in a checkpoint."""
        for array in self._arrays:
            array.flush()
        if self.rows_added != self._committed:
            self._committed_before, self._committed = self._committed, self.rows_added
        return self.rows_added

    def rewind(self, rows_added: int) -> None:
        """Go back to the rows of a checkpoint; later rows are forgotten.

        Raises:
          ValueError: the files do not hold them.
        """
        newest, oldest = (rows_added - 1) % self.size, max(0, rows_added - self.capacity) % self.size
        if rows_added < 0 or (rows_added and self._places[newest, 0] == NO_EPISODE):
            raise ValueError(
                f"{self.folder}: does not hold the {rows_added} rows of the checkpoint; bring back the folder that "
                "the run wrote, or start a new run."
            )
        if rows_added and tuple(self._places[oldest]) > tuple(self._places[newest]):
            raise ValueError(
                f"{self.folder}: some of the {rows_added} rows of the checkpoint were overwritten by later ones; only "
                "the two latest checkpoints can be resumed from."
            )
        self.rows_added = self._committed = self._committed_before = rows_added
        self._episode = int(self._places[newest, 0]) if rows_added else -1

    def draw(
        self, batch: int, rng: np.random.Generator, *, steps: int = 3, discount: float = 0.99, stack: int = 3
    ) -> Transitions:
        """Transitions that start at rows drawn uniformly from those with `steps` rows after them in their episode.

        Args:
          batch: B.
          rng: of this draw: the result is a function of it and of the rows.
          steps: n; a transition never crosses the end of an episode.
          discount: per step.
          stack: frames per observation.

        Raises:
          ValueError: no episode of more than `steps` rows.
        """
        first = self._draw_starts(batch, rng, steps)
        path = (first[:, None] + np.arange(1, steps + 1)) % self.size
        factors = np.cumprod(
            np.concatenate([np.ones((batch, 1), np.float32), discount * self._discounts[path]], axis=1), axis=1
        )
        return Transitions(
            frames=self._stacks(first, stack),
            actions=self._actions[path[:, 0]],
            rewards=np.sum(factors[:, :-1] * self._rewards[path], axis=1, dtype=np.float32),
            discounts=factors[:, -1].astype(np.float32),
            next_frames=self._stacks(path[:, -1], stack),
        )

    def draw_segments(self, batch: int, rng: np.random.Generator, frames: int) -> Segments:
        """Runs of `frames` rows of one episode, drawn uniformly.

        Raises:
          ValueError: no episode of so many rows.
        """
        rows = (self._draw_starts(batch, rng, frames - 1)[:, None] + np.arange(frames)) % self.size
        # What was done at a frame is in the row after it, if that is of the same episode and was added already.
        after = (rows + 1) % self.size
        inside = (self._places[after, 0] == self._places[rows, 0]) & ((rows - (self.rows_added - 1)) % self.size != 0)
        return Segments(
            self._frames[rows],
            np.where(inside[..., None], self._actions[after], np.float32(0)),
            np.where(inside, self._rewards[after], np.float32(0)),
        )

    def draw_stacks(self, batch: int, rng: np.random.Generator, stack: int) -> UInt8[np.ndarray, "B S H W C"]:
        """Frames up to rows that are drawn uniformly, newest last: where imagination starts.

        Not at rows with which an episode ended for good: no action was taken there (MBPO, arXiv 1906.08253, draws
        states of transitions).

        Raises:
          ValueError: no rows.
        """
        return self._stacked(self._draw_starts(batch, rng, 0), stack)

    def _draw_starts(self, batch: int, rng: np.random.Generator, steps: int) -> np.ndarray:
        """Rows, by their place in the files, that begin a transition, drawn uniformly."""
        oldest, newest = self.rows_added - len(self), self.rows_added - 1
        drawn = np.zeros(0, np.int64)
        # Few rows are too close to the end of their episode: drawing again costs less than listing the others.
        for _ in range(TRIES if len(self) > steps else 0):
            more = rng.integers(oldest, newest - steps + 1, size=batch) % self.size
            drawn = np.append(drawn, more[self._is_start(more, steps)])
            if len(drawn) >= batch:
                return drawn[:batch]
        rows = np.arange(oldest, newest - steps + 1) % self.size
        rows = rows[self._is_start(rows, steps)]
        if not len(rows):
            raise ValueError(f"no episode with {steps} steps among {len(self)} rows: collect experience first.")
        return rows[rng.integers(len(rows), size=batch)]

    def _is_start(self, rows: np.ndarray, steps: int) -> np.ndarray:
        place = self._places[rows]
        inside = (place[:, 0] == self._places[(rows + steps) % self.size, 0]) & (place[:, 1] >= 0)
        # Nothing follows on a terminal row: this matters for starts without steps after them.
        return inside & (self._discounts[rows] > 0)

    def _stacks(self, rows: np.ndarray, stack: int) -> np.ndarray:
        """Frames up to each row, `B H W S*C`."""
        frames = self._stacked(rows, stack)
        return np.moveaxis(frames, 1, 3).reshape(*frames.shape[:1], *self.spec.frame[:2], -1)

    def _stacked(self, rows: np.ndarray, stack: int) -> np.ndarray:
        """Frames up to each row, `B S H W C`."""
        place, oldest = self._places[rows, 1] + self.history, self.rows_added - len(self)
        # Neither before the start of the episode nor before the oldest row.
        age = (self.rows_added - 1 - rows) % self.size
        reach = np.minimum(place, self.rows_added - 1 - age - oldest)
        back = np.minimum(np.arange(stack - 1, -1, -1), reach[:, None])
        return self._frames[(rows[:, None] - back) % self.size]


def _take(array: np.memmap, first: int, count: int) -> None:
    """Take disk space for rows of a mapped file; raise `OSError` where the disk is full."""
    if not hasattr(os, "posix_fallocate"):
        return
    row = array.nbytes // len(array)
    with open(array.filename, "r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), array.offset + first * row, count * row)
        except OSError as error:
            # Others say that this file system takes no space ahead.
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
