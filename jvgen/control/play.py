"""Interactive episodes of a world model: actions from the keyboard or a file, frames in the terminal."""

import contextlib
import csv
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from jvgen.control.world_model import WorldModel
from jvgen.storage import Path, local_copy, read_utf8, reading

# Keys that set a component of the action to minus and plus the size, by component.
KEYS = (("a", "d"), ("s", "w"), ("q", "e"), ("f", "r"), ("z", "c"), ("v", "t"))
NO_ACTION, QUIT = " ", ("x", "\x03", "\x04", "")

HELP = "keys: {keys}; space: no action; x: quit"


def actions_from_keys(keys: Iterable[str], width: int, size: float) -> Iterator[np.ndarray]:
    """One action per key: one component at plus or minus `size`, the others 0. Unknown keys are skipped; x quits.

    Raises:
      ValueError: more components than there are keys for.
    """
    if width > len(KEYS):
        raise ValueError(
            f"actions have {width} components, but there are keys for at most {len(KEYS)}; give --actions FILE."
        )
    by_key = {
        key: (component, sign) for component, pair in enumerate(KEYS) for key, sign in zip(pair, (-1, 1), strict=True)
    }
    for key in keys:
        if key in QUIT:
            return
        component, sign = by_key.get(key, (None, 0))
        if key != NO_ACTION and (component is None or component >= width):
            continue
        action = np.zeros(width, np.float32)
        if component is not None:
            action[component] = sign * size
        yield action


def help_text(width: int) -> str:
    """One line that lists the keys and what they do."""
    pairs = ", ".join(f"{low}/{high} component {number}" for number, (low, high) in enumerate(KEYS[:width]))
    return HELP.format(keys=pairs)


def read_actions(path: Path, width: int) -> np.ndarray:
    """Actions of a file, float32 (steps, width): .npy, or .csv with one action per line and an optional header.

    Raises:
      ValueError: no such file, another suffix, another width, or cells that are not numbers.
    """
    path = local_copy(path)
    if not path.is_file():
        raise ValueError(f"--actions {path}: no such file.")
    with reading(path, "(--actions) cannot be read as actions", "Give a .npy or .csv file of numbers."):
        if path.suffix == ".npy":
            with path.open("rb") as stream:
                actions = np.load(stream, allow_pickle=False)
        elif path.suffix == ".csv":
            rows = [row for row in csv.reader(read_utf8(path).splitlines()) if row]
            if rows and not _is_number(rows[0][0]):
                rows = rows[1:]
            actions = np.array([[float(cell) for cell in row] for row in rows])
        else:
            raise ValueError("expected .npy or .csv")
        actions = np.asarray(actions, np.float32)
    if actions.ndim != 2 or actions.shape[1] != width or not len(actions):
        raise ValueError(f"--actions {path}: has shape {actions.shape}; expected one line of {width} numbers per step.")
    return actions


def play(
    world: WorldModel,
    context: np.ndarray,
    actions: Iterable[np.ndarray | None],
    *,
    seed: int = 0,
    show: Callable[[np.ndarray, str], None] | None = None,
) -> tuple[np.ndarray, list[float]]:
    """Step one episode with the given actions; beyond the horizon its last frames become a new context.

    Args:
      world: the world model.
      context: uint8 `T H W 3`, T = world.context_frames.
      actions: one per step; None where the world takes none.
      seed: of the episode.
      show: called with every frame and a line of text about it.

    Returns:
      uint8 `F H W 3`, the context and all predicted frames; and the rewards, empty without the reward head.

    Raises:
      NotFinite: a frame or a reward with NaN or infinity.
    """
    show = show or (lambda frame, line: None)
    state = world.reset(context[None], seed)
    frames, rewards = [*context], []
    show(context[-1], "start")
    for number, action in enumerate(actions):
        if number and number % world.horizon == 0:
            state = world.refresh(state)
        state, frame, reward = world.step(state, None if action is None else action[None])
        pixels, reward = world.observed(state, frame, reward, number + 1)
        frames.append(pixels[0])
        line = f"step {number + 1}"
        if action is not None:
            line += f"  action {np.array2string(action, precision=2, separator=',')}"
        if reward is not None:
            rewards.append(float(reward[0]))
            line += f"  reward {rewards[-1]:.3f}"
        show(frames[-1], line)
    return np.stack(frames), rewards


def terminal_image(frame: np.ndarray, columns: int = 64) -> str:
    """A frame as colored text, two rows of pixels per line, for terminals with 24-bit color."""
    step = max(1, -(-frame.shape[1] // columns))
    small = frame[::step, ::step]
    if len(small) % 2:
        small = np.concatenate([small, small[-1:]])
    lines = []
    for upper, lower in zip(small[::2], small[1::2], strict=True):
        cells = [
            f"\x1b[38;2;{u[0]};{u[1]};{u[2]};48;2;{w[0]};{w[1]};{w[2]}m\u2580"
            for u, w in zip(upper, lower, strict=True)
        ]
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)


class TerminalView:
    """Redraws every frame at the same place of a terminal."""

    def __init__(self, write: Callable[[str], Any] | None = None):
        self._write = write or (lambda text: (sys.stdout.write(text), sys.stdout.flush()))
        self._height = 0

    def __call__(self, frame: np.ndarray, line: str) -> None:
        text = f"{terminal_image(frame)}\n{line}\x1b[K\n"
        self._write((f"\x1b[{self._height}A" if self._height else "") + text)
        self._height = text.count("\n")


def pressed_keys() -> Iterator[str]:
    """Characters of standard input until it ends; from a terminal, as they are pressed, without Enter."""
    with contextlib.ExitStack() as stack:
        if sys.stdin.isatty():
            import termios
            import tty

            before = termios.tcgetattr(sys.stdin)
            stack.callback(termios.tcsetattr, sys.stdin, termios.TCSADRAIN, before)
            tty.setcbreak(sys.stdin.fileno())
        while True:
            key = sys.stdin.read(1)
            if not key:
                return
            yield key


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
