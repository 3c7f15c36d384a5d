"""One of two processes that share the tokens of a sequence: `sequence.py PORT PROCESS`; prints the largest error."""

import functools
import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jvgen.kernels.attention import reference
from jvgen.nn.attention import AttentionKernel, attention
from jvgen.nn.sequence_parallel import SequenceParallel
from jvgen.parallel import axes
from jvgen.parallel.mesh import MeshConfig, make_mesh
from jvgen.parallel.rules import Sharding, ShardingConfig

jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
SHAPE, OPTIONS = (1, 32, 6, 8), {"scale": 0.4, "valid_length": 20}


def passes(attend, query, key, value, gradient):
    output, pull = jax.vjp(attend, query, key, value)
    seen = (jnp.arange(SHAPE[1]) < 20)[None, :, None, None]
    return jnp.where(seen, output, 0), *pull(jnp.where(seen, gradient, 0))


arrays = np.random.default_rng(0).normal(size=(4, *SHAPE)).astype(np.float32)
with jax.default_device(jax.local_devices()[0]):
    expected = jax.jit(functools.partial(passes, functools.partial(reference.attention, **OPTIONS)))(*arrays)
sharding = Sharding(make_mesh(MeshConfig(fsdp=1, seq=4)), ShardingConfig())
place = NamedSharding(sharding.mesh, P(None, "seq"))
for way in (SequenceParallel.GATHER, SequenceParallel.ULYSSES, SequenceParallel.RING):
    choice = {"kernel": AttentionKernel.CHUNKED, "sequence": way}

    def run(*arrays, choice=choice):
        with axes.partitioned(sharding):
            return passes(functools.partial(attention, **OPTIONS, **choice), *arrays)

    placed = [jax.make_array_from_callback(SHAPE, place, functools.partial(np.ndarray.__getitem__, a)) for a in arrays]
    errors = [
        float(np.abs(np.asarray(shard.data) - np.asarray(want)[shard.index]).max())
        for got, want in zip(jax.jit(run, out_shardings=place)(*placed), expected, strict=True)
        for shard in got.addressable_shards
    ]
    print(way.value, max(errors), flush=True)
