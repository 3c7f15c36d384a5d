"""Which frames of a recording are at given times, at constant and at variable frame rates."""

import numpy as np

# A recording may be this much slower than the rate at which frames are taken: rates such as 29.97 stand for 30.
SLOWEST = 0.98


def offsets(recorded: np.ndarray | float, rate: float, number: np.ndarray | int) -> np.ndarray:
    """Recorded frames from the first frame of an example to its frame `number`, int64, at a constant recorded rate.

    Args:
      recorded: frames per second of the recording.
      rate: frames per second of the example.
    """
    return np.floor(np.asarray(number) * (np.asarray(recorded, np.float64) / rate) + 0.5).astype(np.int64)


def frames_at(times: np.ndarray, start: int, rate: float, count: int) -> np.ndarray:
    """Recorded frames of an example of `count` frames, int64: those whose times are nearest to a constant rate.

    An example that would end after the recording begins earlier.

    Args:
      times: seconds of the recorded frames, increasing.
      start: recorded frame at which the example begins.
      rate: frames per second of the example.
    """
    wanted = np.arange(count) / rate
    wanted += max(times[0], min(times[start], times[-1] - wanted[-1]))
    after = np.minimum(np.searchsorted(times, wanted), len(times) - 1)
    before = np.maximum(after - 1, 0)
    return np.where(wanted - times[before] <= times[after] - wanted, before, after).astype(np.int64)
