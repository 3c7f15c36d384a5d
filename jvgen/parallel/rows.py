"""Which rows of the global batch each process holds, and global arrays made of the rows that a process has read."""

import functools

import jax
import numpy as np
from jax.sharding import NamedSharding


@functools.lru_cache(maxsize=1024)
def rows_by_process(sharding: NamedSharding, size: int) -> dict[int, np.ndarray]:
    """The rows of a batch of `size` that the devices of each process hold.

    A row is held by several processes where the mesh splits or replicates one example across them.

    Args:
      sharding: of the batch axis; its devices may be described ones.
      size: rows of the global batch.

    Returns:
      Process index -> increasing row numbers, int64.
    """
    held: dict[int, set[int]] = {}
    for device, (rows,) in sharding.devices_indices_map((size,)).items():
        held.setdefault(device.process_index, set()).update(range(*rows.indices(size)))
    return {process: np.array(sorted(rows), np.int64) for process, rows in sorted(held.items())}


def global_array(local: np.ndarray, rows: np.ndarray, shape: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
    """The global array of which this process has read some rows; every process takes part, with its own rows.

    Args:
      local: the rows of this process, (len(rows), *shape[1:]).
      rows: their numbers in the global array, increasing; all rows that this process's devices hold.
      shape: of the global array.
      sharding: of the global array.
    """
    assert local.shape == (len(rows), *shape[1:]), f"{local.shape} for {len(rows)} rows of {shape}"
    if sharding.is_fully_addressable:
        return jax.device_put(local, sharding)

    # `make_array_from_process_local_data` refuses processes whose rows overlap without being equal, as on a torus.
    return jax.make_array_from_callback(
        shape, sharding, lambda index: shard_of(local, rows, shape[0], index), dtype=local.dtype
    )


def shard_of(local: np.ndarray, rows: np.ndarray, size: int, index: tuple[slice, ...]) -> np.ndarray:
    """The part `index` of a global array with `size` rows, of which `local` has the numbers `rows` (increasing)."""
    start, stop, _ = index[0].indices(size)
    first = int(np.searchsorted(rows, start))
    shard = local[(slice(first, first + stop - start), *index[1:])]
    assert np.array_equal(rows[first : first + stop - start], np.arange(start, stop)), f"rows {start}:{stop} not read"
    return shard
