"""Hooks: objects that the training loop calls at the events of a run, on process 0."""

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jvgen import exit_codes
from jvgen.storage import Path
from jvgen.training.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """What hooks are told when training starts.

    Attributes:
      experiment: the run's resolved config.
      workdir: run directory.
      start_step: steps done before: 0, or the step of the restored checkpoint. Hooks that write files drop what was
        logged for this step and later ones, because these steps are logged again.
      document: config, package versions, git commit and digest of the frozen weights, as JSON values.
    """

    experiment: Experiment
    workdir: Path
    start_step: int
    document: dict[str, Any]


class Hook:
    """Base class of hooks: every method does nothing. Override those you need and pass instances to `train(hooks=...)`.

    Methods are called on the main thread of process 0, so what they take adds to the step time. They must not call JAX
    collectives. An exception ends the run with a `HookError` that names the hook.
    """

    def on_start(self, run: RunInfo) -> None:
        """Called once, after restoring and compiling, before the first step."""

    def on_step(self, row: Mapping[str, Any]) -> None:
        """Called after every step, in order, with its row of metrics.jsonl: "step" (0-based), "loss", "seconds", ...

        It is called while the devices compute the next one, and always before the step is saved.
        """

    def on_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Called after every evaluation with its metrics ("loss", "ema_0.9999/loss", ...) and its "seconds".

        Args:
          step: number of steps done.
        """

    def on_samples(self, step: int, clips: Mapping[str, np.ndarray]) -> None:
        """Called with the clips of the task's `visualize`: uint8 `B F H W 3` by name."""

    def on_checkpoint(self, step: int) -> None:
        """Called when the checkpoint of a step is completely written, which is some steps after it was started."""

    def on_report(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """Called with numbers about the run that do not belong to one step.

        Args:
          name: "start", once, after the first step: seconds of this start by part, and their "total"; or "goodput",
            about every 30 s and at the end: what the time of all starts was spent on (see
            `jvgen.training.telemetry.goodput.Goodput.summary`).
          step: number of steps done.
        """

    def on_end(self, status: int | None) -> None:
        """Called once however the run ends, also when it fails before `on_start`.

        Args:
          status: exit status of `train`, or None if an exception ends the run.
        """


class HookError(RuntimeError):
    """A hook raised; the message names it.

    Has the `exit_code` of what it raised, if that is a known one: of a full disk, of storage that was away.
    """


class HookList(Hook):
    """Calls several hooks, one after the other, in the order given."""

    def __init__(self, hooks: Iterable[Hook]):
        self._hooks = tuple(hooks)

    def on_start(self, run: RunInfo) -> None:
        self._call_all("on_start", run)

    def on_step(self, row: Mapping[str, Any]) -> None:
        self._call_all("on_step", row)

    def on_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        self._call_all("on_evaluation", step, values)

    def on_samples(self, step: int, clips: Mapping[str, np.ndarray]) -> None:
        self._call_all("on_samples", step, clips)

    def on_checkpoint(self, step: int) -> None:
        self._call_all("on_checkpoint", step)

    def on_report(self, name: str, step: int, values: Mapping[str, float]) -> None:
        self._call_all("on_report", name, step, values)

    def on_end(self, status: int | None) -> None:
        """Calls all of them, even if one raises: files and connections are closed here."""
        with contextlib.ExitStack() as stack:
            for hook in reversed(self._hooks):
                stack.callback(_call, hook, "on_end", status)

    def _call_all(self, event: str, *arguments: Any) -> None:
        for hook in self._hooks:
            _call(hook, event, *arguments)


def _call(hook: Hook, event: str, *arguments: Any) -> None:
    try:
        getattr(hook, event)(*arguments)
    except Exception as error:
        name = f"{type(hook).__module__}.{type(hook).__qualname__}"
        raised = HookError(f"hook {name} failed in {event}: {type(error).__name__}: {error}")
        code = exit_codes.of_error(error)
        if code != exit_codes.ERROR:
            raised.exit_code = code
        raise raised from error
