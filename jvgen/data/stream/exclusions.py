"""Records that a source leaves out: the names of another data set's test recordings, shipped or in a file."""

import functools
import hashlib
from pathlib import Path as LocalPath

import numpy as np

from jvgen.data.store.index import Index
from jvgen.storage import as_path, read_text

# Lists that are part of the package, by name. "robonet_test": the 126 episodes of Open X-Embodiment's robo_net that are
# among the 256 test episodes of RoboNet, as iVideoGPT's release lists them.
SHIPPED = {"robonet_test": LocalPath(__file__).with_name("robonet_test.txt")}


@functools.lru_cache(maxsize=16)
def read(exclude: str) -> frozenset[str]:
    """The names of a shipped list or of a text file, separated by spaces or lines; # starts a line of comment.

    Raises:
      ValueError: neither a shipped list nor a file, or one without names.
    """
    path = SHIPPED.get(exclude) or as_path(exclude)
    if not path.is_file():
        raise ValueError(f"exclude = {exclude!r}: name a text file, or one of the lists {', '.join(sorted(SHIPPED))}.")
    lines = (line for line in read_text(path).splitlines() if not line.startswith("#"))
    names = frozenset(name for line in lines for name in line.split())
    if not names:
        raise ValueError(f"exclude = {exclude!r}: the file has no names.")
    return names


def excluded_rows(exclude: str, index: Index) -> np.ndarray:
    """Which rows of an index are left out, bool: a part of their id, with or without its suffix, is in the list.

    The id "robo_net/berkeley_sawyer_traj12.hdf5" has the parts "robo_net" and "berkeley_sawyer_traj12(.hdf5)".
    """
    names = read(exclude)

    def listed(identifier: str) -> bool:
        parts = identifier.split("/")
        return any(part in names or part.rpartition(".")[0] in names for part in parts)

    return np.fromiter((listed(identifier) for identifier in index.id.tolist()), bool, len(index))


def digest(exclude: str) -> str:
    """Changes with the names of a list."""
    return hashlib.sha256("\n".join(sorted(read(exclude))).encode()).hexdigest()
