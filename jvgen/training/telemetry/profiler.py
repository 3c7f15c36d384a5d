"""Traces of training steps for XProf, by JAX's profiler."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import jax

from jvgen import storage
from jvgen.parallel import processes
from jvgen.training.config import TrainingConfig

FOLDER = "profile"


class Profiler:
    """Traces the steps of `training.profile_steps` to `profile/` in the run directory, for `xprof --logdir`.

    Args:
      training: says which steps and on which processes.
      workdir: run directory.
      start_step: steps done before.
      log: takes messages for the user.
    """

    def __init__(self, training: TrainingConfig, workdir: storage.Path, start_step: int, log: Callable[[str], None]):
        self._log, self._running = log, False
        self._folder = storage.Mirror(workdir / FOLDER, log=log) if self._wanted(training, start_step) else None
        self._first, self._stop = training.profile_steps or (0, 0)
        self._first = max(self._first, start_step)

    def _wanted(self, training: TrainingConfig, start_step: int) -> bool:
        if training.profile_steps is None:
            return False
        first, stop = training.profile_steps
        if stop <= start_step:
            self._log(f"training.profile_steps = {first},{stop}: before step {start_step}, so nothing is traced")
            return False
        return training.profile_processes == "all" or processes.index() == 0

    def before_step(self, step: int, wait: Callable[[], None]) -> None:
        """Start or stop the trace, if it is due before this step.

        Args:
          wait: waits for the steps that were dispatched, so that the trace holds whole steps.
        """
        if self._folder is None:
            return
        if self._running and step >= self._stop:
            wait()
            self.close()
        elif not self._running and self._first <= step < self._stop:
            wait()
            jax.profiler.start_trace(str(self._folder.local))
            self._running = True

    def step(self, step: int) -> AbstractContextManager[None]:
        """Context of a step, by which XProf tells steps apart; no cost without a trace."""
        if not self._running:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def close(self) -> None:
        """Stop a running trace and write it."""
        if self._folder is None:
            return
        if self._running:
            jax.profiler.stop_trace()
            self._log(
                f"traced steps {self._first} to {self._stop - 1} to {self._folder.path}: pip install xprof; "
                f"xprof --logdir {self._folder.path}"
            )
        self._running = False
        self._folder.close()
        self._folder = None
