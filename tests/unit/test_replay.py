"""Transitions against brute force over episode borders and the ring's seam; what a killed run resumes with."""

import errno
import os

import numpy as np
import pytest

from jvgen.control.replay import ReplayRing, RowSpec

SPEC = RowSpec(frame=(2, 2, 1), action_width=2)


def fill(ring: ReplayRing, lengths: list[int], first: int = 0) -> list[list[tuple[np.ndarray, ...]]]:
    """Episodes whose frames, actions and rewards tell their number; returns them in order."""
    episodes, number = [], first
    for length in lengths:
        rows = []
        for place in range(length + 1):
            frame = np.full(SPEC.frame, number % 251, np.uint8)
            action, reward = np.array([number, place], np.float32), float(number)
            discount = 0.0 if place == length and length % 2 else 1.0
            if place == 0:
                ring.begin(frame)
                rows.append((frame, np.zeros(2, np.float32), 0.0, 1.0))
            else:
                ring.add(frame, action, reward, discount)
                rows.append((frame, action, reward, discount))
            number += 1
        episodes.append(rows)
    return episodes


def brute_force(episodes, capacity: int, steps: int, discount: float, stack: int) -> dict[tuple, tuple]:
    """All transitions of the last `capacity` rows by the first row's frame, in plain Python."""
    total, made, position = sum(len(rows) for rows in episodes), {}, 0
    for rows in episodes:
        oldest = max(0, total - capacity - position)
        for t in range(oldest, len(rows) - steps):
            value, factor = 0.0, 1.0
            for step in range(1, steps + 1):
                value += factor * rows[t + step][2]
                factor *= discount * rows[t + step][3]

            def stacked(i: int, rows=rows, oldest=oldest) -> np.ndarray:
                return np.concatenate([rows[max(oldest, i - back)][0] for back in range(stack - 1, -1, -1)], axis=-1)

            made[int(rows[t][0].flat[0])] = (stacked(t), rows[t + 1][1], value, factor, stacked(t + steps))
        position += len(rows)
    return made


@pytest.mark.parametrize(("steps", "stack"), [(1, 1), (3, 3), (2, 4)])
def test_transitions_equal_brute_force(tmp_path, steps, stack) -> None:
    ring = ReplayRing(tmp_path, SPEC, capacity=30, reserve=12)
    episodes = []
    for lengths in ([4], [5], [1], [4], [5], [2], [5], [4], [5]):
        first = sum(len(rows) for rows in episodes)
        episodes += fill(ring, lengths, first)
        ring.commit()
    expected = brute_force(episodes, 30, steps, 0.9, stack)
    drawn = ring.draw(2000, np.random.default_rng(0), steps=steps, discount=0.9, stack=stack)
    seen = set()
    for frames, action, reward, discount, after in zip(*drawn, strict=True):
        number = int(frames[0, 0, -1])
        seen.add(number)
        wanted = expected[number]
        np.testing.assert_array_equal(frames, wanted[0])
        np.testing.assert_array_equal(action, wanted[1])
        assert reward == pytest.approx(wanted[2], rel=1e-5) and discount == pytest.approx(wanted[3], rel=1e-5)
        np.testing.assert_array_equal(after, wanted[4])
    assert seen == set(expected)


def test_a_killed_run_draws_what_it_would_have_drawn(tmp_path) -> None:
    """Rows added after the checkpoint, over the seam of the ring, change nothing for the run that resumes from it."""
    ring = ReplayRing(tmp_path, SPEC, capacity=20, reserve=12)
    for number in range(6):
        fill(ring, [4], 5 * number)
        ring.commit()
    saved = ring.commit()
    wanted = ring.draw(50, np.random.default_rng(3))
    fill(ring, [6], 100)
    resumed = ReplayRing(tmp_path, SPEC, capacity=20, reserve=12)
    resumed.rewind(saved)
    for mine, theirs in zip(resumed.draw(50, np.random.default_rng(3)), wanted, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    fill(resumed, [4], 30)
    assert resumed.rows_added == saved + 5 and len(resumed) == 20


def test_rows_that_are_not_there_any_more_are_refused(tmp_path) -> None:
    """A folder that was lost is made anew, and holds nothing; rows of an old checkpoint may have been overwritten."""
    with pytest.raises(ValueError, match="does not hold the 5 rows"):
        ReplayRing(tmp_path / "lost", SPEC, capacity=20, reserve=12).rewind(5)
    ring = ReplayRing(tmp_path / "kept", SPEC, capacity=20, reserve=12)
    saved = []
    for number in range(8):
        fill(ring, [4], 5 * number)
        saved.append(ring.commit())
    with pytest.raises(ValueError, match="some of the 25 rows .* were overwritten"):
        ring.rewind(saved[4])
    for rows in saved[-2:]:
        again = ReplayRing(tmp_path / "kept", SPEC, capacity=20, reserve=12)
        again.rewind(rows)
        assert again.rows_added == rows


def test_segments_equal_brute_force(tmp_path) -> None:
    """Each frame with the action taken at it and its reward, which are those of the next row; none at the end."""
    ring = ReplayRing(tmp_path, SPEC, capacity=30, reserve=40)
    episodes = fill(ring, [4, 2, 6, 3])
    drawn = ring.draw_segments(500, np.random.default_rng(0), 4)
    rows = {int(rows[t][0].flat[0]): (rows, t) for rows in episodes for t in range(len(rows))}
    starts = set()
    for frames, actions, rewards in zip(*drawn, strict=True):
        episode, t = rows[int(frames[0].flat[0])]
        starts.add(int(frames[0].flat[0]))
        for place in range(4):
            np.testing.assert_array_equal(frames[place], episode[t + place][0])
            after = episode[t + place + 1] if t + place + 1 < len(episode) else (None, np.zeros(2), 0.0)
            np.testing.assert_array_equal(actions[place], after[1])
            assert rewards[place] == after[2]
    assert starts == {0, 1, 8, 9, 10, 11, 15}
    stacks = ring.draw_stacks(200, np.random.default_rng(0), 3)
    for stack in stacks[:, :, 0, 0, 0]:
        episode, t = rows[int(stack[-1])]
        assert stack.tolist() == [int(episode[max(0, t - back)][0].flat[0]) for back in (2, 1, 0)]
    # All 19 rows but the last one, with which its episode ended for good.
    assert {int(stack[-1].flat[0]) for stack in stacks} == set(range(18))


def test_episodes_with_a_history(tmp_path) -> None:
    """The first stack shows frames before the episode, from which no transition starts."""
    ring = ReplayRing(tmp_path, SPEC, capacity=30, reserve=40, history=2)
    images = [np.full(SPEC.frame, number, np.uint8) for number in range(12)]
    for first in (0, 6):
        ring.begin(images[first + 2], history=images[first : first + 2])
        for number in range(first + 3, first + 6):
            ring.add(images[number], np.full(2, number, np.float32), float(number))
    drawn = ring.draw(200, np.random.default_rng(0), steps=2, discount=0.5, stack=3)
    seen = {
        tuple(frames[0, 0]): (reward, tuple(after[0, 0])) for frames, _, reward, _, after in zip(*drawn, strict=True)
    }
    assert seen == {
        (0, 1, 2): (3 + 0.5 * 4, (2, 3, 4)), (1, 2, 3): (4 + 0.5 * 5, (3, 4, 5)),
        (6, 7, 8): (9 + 0.5 * 10, (8, 9, 10)), (7, 8, 9): (10 + 0.5 * 11, (9, 10, 11)),
    }  # fmt: skip
    with pytest.raises(ValueError, match="0 frames before the first one: this replay keeps 2"):
        ring.begin(images[0])


def test_a_full_disk_is_an_error_and_rows_go_on_when_there_is_space(tmp_path, monkeypatch) -> None:
    """A write to a mapped file without space is a bus error, which ends the process without a word."""
    ring, taken = ReplayRing(tmp_path, SPEC, capacity=600, reserve=400), []
    fill(ring, [200])
    # Rows that were added have their space; the files are not written whole before that.
    assert (tmp_path / "frames.npy").stat().st_size > 1000 * 4
    place = os.posix_fallocate

    def full(file, offset, length):
        taken.append(length)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        OSError, match=r"full after 256 of 1,000 rows, which take 0.0 GiB .*task.replay_capacity"
    ) as error:
        fill(ring, [200], 201)
    assert error.value.errno == errno.ENOSPC and ring.rows_added == 256 and taken == [256 * 4]
    monkeypatch.setattr(os, "posix_fallocate", place)
    ring.add(np.zeros(SPEC.frame, np.uint8), np.zeros(2, np.float32), 0.0)
    assert ring.rows_added == 257


def test_bad_input(tmp_path) -> None:
    ring = ReplayRing(tmp_path, SPEC, capacity=4, reserve=3)
    frame, action = np.zeros(SPEC.frame, np.uint8), np.zeros(2, np.float32)
    with pytest.raises(ValueError, match="add before begin"):
        ring.add(frame, action, 0.0)
    with pytest.raises(ValueError, match="no episode with 3 steps among 0 rows"):
        ring.draw(1, np.random.default_rng(0))
    ring.begin(frame)
    for bad in ((frame.astype(np.float32), action, 0.0), (frame, action[:1], 0.0)):
        with pytest.raises(ValueError, match="this replay holds"):
            ring.add(*bad)
    for bad in ((frame, action * np.nan, 0.0), (frame, action, np.inf)):
        with pytest.raises(ValueError, match="must be finite"):
            ring.add(*bad)
    ring.add(frame, action, 0.0)
    ring.add(frame, action, 0.0)
    with pytest.raises(ValueError, match="reserve = 3"):
        ring.add(frame, action, 0.0)
    with pytest.raises(ValueError, match="a replay of"):
        ReplayRing(tmp_path, RowSpec((2, 2, 3), 2), capacity=4, reserve=3)
    with pytest.raises(ValueError, match="at least 2 and 1 rows"):
        ReplayRing(tmp_path / "other", SPEC, capacity=1)
