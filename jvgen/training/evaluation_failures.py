"""How often the evaluation of a step has failed, across restarts of the run."""

import json

from jvgen import storage
from jvgen.parallel import processes
from jvgen.storage import Path

FILE = "evaluation_failures.json"


class EvaluationFailures:
    """Notes an evaluation before it begins and removes the note when it ends: what stays is a failure.

    Args:
      workdir: run directory.
      allowed: failures in a row after which the evaluation of a step is left out.
    """

    def __init__(self, workdir: Path, allowed: int = 2):
        self.allowed = allowed
        self._path = workdir / FILE

    def begin(self, step: int) -> bool:
        """Whether to evaluate this step; the same answer on every process."""
        failed = 0
        if processes.index() == 0:
            failed = self._failed(step)
            if failed < self.allowed:
                storage.write_text(self._path, json.dumps({"step": step, "begun": failed + 1}))
        return processes.broadcast(failed, "evaluation failures") < self.allowed

    def end(self) -> None:
        """The evaluation has ended without an error, or because the run stops."""
        if processes.index() == 0:
            self._path.unlink(missing_ok=True)

    def _failed(self, step: int) -> int:
        try:
            noted = json.loads(storage.read_text(self._path))
            return int(noted["begun"]) if noted["step"] == step else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0
