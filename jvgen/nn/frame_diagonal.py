"""Dispatcher of the diagonal of attention among frames: chooses a kernel, and runs it on each device's own queries."""

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jvgen.kernels.frame_diagonal import reference, shifted
from jvgen.nn.sequence_parallel import gathered
from jvgen.parallel import axes


def mean_diagonal(
    query: Float[Array, "B L N D"], key: Float[Array, "B L N D"], *, frames: int, start: int, stop: int
) -> Float[Array, "B N"]:
    """How much each frame attends to itself among the frames at its place: mean over places and frames, float32.

    On a mesh each device processes its own queries, with keys gathered along the sequence axis, as in attention.

    Args:
      query, key: rows of a sequence.
      frames: number of frames.
      start, stop: first row of the video, and the row after its last.
    """
    video = {"frames": frames, "start": start, "stop": stop}
    partitioner = axes.current()
    if partitioner is None or partitioner.mesh.size == 1:
        return _summed(query, key, **video) / (stop - start)
    spec = partitioner.activation((axes.BATCH, axes.LENGTH, axes.ACTIVATION_HEADS, None), query.shape).spec
    batch, split, heads = spec[0], spec[1], spec[2]

    def local(query: jax.Array, key: jax.Array) -> jax.Array:
        if split is None:
            return _summed(query, key, **video)
        first = jax.lax.axis_index(split) * query.shape[1]
        return jax.lax.psum(shifted.summed_diagonal(query, gathered(key, split), first=first, **video), split)

    specs = {"in_specs": (spec, spec), "out_specs": PartitionSpec(batch, heads)}
    return jax.shard_map(local, mesh=partitioner.mesh, check_vma=False, **specs)(query, key) / (stop - start)


def _summed(query: jax.Array, key: jax.Array, **video: int) -> jax.Array:
    # The reference is four times as fast on CPUs.
    kernel = shifted if axes.platform() == "tpu" else reference
    return kernel.summed_diagonal(query, key, **video)
