"""The parameters of a checkpoint as NumPy arrays, by Orbax alone and on any machine: jvgen is not imported."""

import json
import sys
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp


def read_checkpoint(step: Path, prefix: str = "parameters/") -> dict[str, np.ndarray]:
    """The arrays of RUN/checkpoints/STEP whose names begin with `prefix`, such as "ema/0.9999/"."""
    names = json.loads((step / "digests" / "metadata").read_text())["arrays"]
    wanted = [name for name in names if name.startswith(prefix)]
    # As NumPy arrays: otherwise Orbax looks for the devices of the run that saved them.
    whole = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in wanted}
    request = ocp.args.PyTreeRestore(item=dict.fromkeys(wanted, 0), restore_args=whole, partial_restore=True)
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore((step / "state").absolute(), args=request)


if __name__ == "__main__":
    for name, array in read_checkpoint(Path(sys.argv[1])).items():
        print(name, array.shape)
