"""How XLA's TPU compiler sends, and what it runs beside products, read in the schedule of small compiled programs.

What this says decides how the step is written: an all-gather of the next layer's parameters ahead of time would hide
nothing on v5p. If a test fails with a new libtpu, that is news.
"""

import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jvgen.parallel.mesh import FSDP, SEQ, MeshConfig
from jvgen.preflight import hlo, program_cost, topology
from jvgen.preflight.ahead_of_time import without_cache

pytestmark = pytest.mark.skipif(not topology.has_compiler(), reason="needs libtpu, the TPU compiler")
LAYERS, ROWS, WIDTH = 4, 65536, 4096


def prefetching(mesh: Mesh) -> Callable:
    """A scan that gathers the next layer's kernel in its carry while it multiplies by this one's."""

    def run(x: jax.Array, kernels: jax.Array) -> jax.Array:
        def whole(kernel: jax.Array) -> jax.Array:
            return jax.lax.with_sharding_constraint(kernel, NamedSharding(mesh, P()))

        def body(carry: tuple, kernel: jax.Array) -> tuple:
            x, current = carry
            return (jnp.tanh(x @ current), whole(kernel)), None

        return jax.lax.scan(body, (x, whole(kernels[0])), jnp.roll(kernels, -1, 0))[0][0]

    return run


def multiplying_what_is_here(mesh: Mesh) -> Callable:
    """A scan that multiplies by the shard of the kernel at hand while the next shard comes from the neighbor."""

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(FSDP), P(None, FSDP)), out_specs=P(FSDP), check_vma=False)
    def run(x: jax.Array, kernels: jax.Array) -> jax.Array:
        count, index, rows = jax.lax.axis_size(FSDP), jax.lax.axis_index(FSDP), kernels.shape[1]

        def body(x: jax.Array, shard: jax.Array) -> tuple:
            total = jnp.zeros((x.shape[0], WIDTH), jnp.float32)
            for hop in range(count):
                next_shard = jax.lax.ppermute(shard, FSDP, [(i, (i + 1) % count) for i in range(count)])
                part = jax.lax.dynamic_slice(x, (0, ((index - hop) % count) * rows), (x.shape[0], rows))
                total = total + jnp.dot(part, shard, preferred_element_type=jnp.float32)
                shard = next_shard
            return jnp.tanh(total).astype(jnp.bfloat16), None

        return jax.lax.scan(body, x, kernels)[0]

    return run


def compiled(make: Callable[[Mesh], Callable], name: str) -> str:
    _, mesh = topology.describe_for(MeshConfig(), name)
    places = NamedSharding(mesh, P(FSDP)), NamedSharding(mesh, P(None, FSDP))
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.bfloat16)
    kernels = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.bfloat16)
    with without_cache():
        text = jax.jit(make(mesh), in_shardings=places).lower(x, kernels).compile().as_text()
    assert "is_scheduled=true" in text
    return text


@pytest.mark.parametrize("name,asynchronous", [("v5p:2x2x1", False), ("v6e:2x2", False), ("v5e:2x2", True)])
def test_gathers_of_the_next_layer_are_hidden_on_v5e_only(name, asynchronous):
    text = compiled(prefetching, name)
    assert " all-gather(" in text and "all-gather-start" not in text
    assert ("AsyncCollectiveStart" in text) is asynchronous


def test_hops_between_neighbors_are_hidden_on_v5p():
    """Between the start and the end of some hops there is a product."""
    operations = re.findall(
        r"^\s+(?:ROOT )?%?[\w.\-]+ = .*? (collective-permute-start|collective-permute-done|fusion)\((.*)$",
        compiled(multiplying_what_is_here, "v5p:2x2x1"),
        re.M,
    )
    flying, covered = 0, 0
    for kind, rest in operations:
        flying += {"collective-permute-start": 1, "collective-permute-done": -1}.get(kind, 0)
        covered += kind == "fusion" and "kind=kOutput" in rest and flying > 0
    assert covered >= 2


@pytest.mark.parametrize("stages,kinds", [((), [("all-reduce", 6)]), ((FSDP,), [("all-gather", 0)] * 2)])
def test_a_gather_over_a_whole_torus_is_a_sum_over_six_links(stages, kinds):
    """It sends twice the bytes of a gather, over three times the links of one ring; in two stages it is two gathers."""
    _, mesh = topology.describe_for(MeshConfig(seq=4), "v5p:4x4x4")
    width, rows = 1920, NamedSharding(mesh, P(FSDP))

    def run(x: jax.Array, kernel: jax.Array) -> jax.Array:
        for axis in (*stages, None):
            kernel = jax.lax.with_sharding_constraint(kernel, NamedSharding(mesh, P(axis)))
        return jnp.tanh(jnp.dot(x, kernel, precision="default"))

    x, kernel = jax.ShapeDtypeStruct((16, 256, width), jnp.bfloat16), jax.ShapeDtypeStruct((width, width), jnp.bfloat16)
    places = rows, NamedSharding(mesh, P((FSDP, SEQ)))
    with without_cache():
        text = jax.jit(run, in_shardings=places, out_shardings=rows).lower(x, kernel).compile().as_text()
    sent = [one.sent for one in program_cost.operations(hlo.parse(text)) if one.sent is not None]
    assert [(one.kind, one.links) for one in sent] == kinds
