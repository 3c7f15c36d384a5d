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
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jvgen.parallel import axes, rules
from jvgen.parallel.mesh import FSDP, MESH_AXES, SEQ, MeshConfig, make_mesh
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


@pytest.mark.parametrize("neighbors", [True, False])
def test_rings_on_v5e_are_hidden_if_they_pass_each_link_once(neighbors):
    """XLA makes every hop of a ring on v5e wait if one of them is longer than a link."""
    devices = topology.describe("v5e:8x16").devices
    if neighbors:
        mesh = make_mesh(MeshConfig(seq=4), devices)
    else:
        lines = mesh_utils.create_device_mesh((1, 32, 4, 1), list(devices), allow_split_physical_axes=True)
        mesh = Mesh(lines, MESH_AXES)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(FSDP, SEQ), out_specs=P(FSDP, SEQ), check_vma=False)
    def run(x: jax.Array) -> jax.Array:
        following = jax.lax.ppermute(x, SEQ, [(i, (i + 1) % 4) for i in range(4)])
        return following + jnp.tanh(x @ x)

    x = jax.ShapeDtypeStruct((32 * 1024, 4 * 1024), jnp.bfloat16, sharding=NamedSharding(mesh, P(FSDP, SEQ)))
    with without_cache():
        text = jax.jit(run).lower(x).compile().as_text()
    assert ("collective-permute-start(" in text) is neighbors and (" collective-permute(" in text) is not neighbors


@pytest.mark.parametrize("summed_whole", [True, False])
def test_gradients_of_convolutions_are_not_made_shard_by_shard(summed_whole, monkeypatch):
    """Else XLA makes each shard in an iteration of a loop, which reads the whole images and their gradients again."""
    if not summed_whole:
        monkeypatch.setattr(rules, "_summed_whole", lambda names, leaf: False)
    _, mesh = topology.describe_for(MeshConfig(), "v5e:4x4")
    sharding = rules.Sharding(mesh, rules.ShardingConfig())
    names = (None, None, axes.CONV_IN, axes.CONV_OUT)

    def loss(kernel: jax.Array, images: jax.Array) -> jax.Array:
        kernel = sharding.fsdp_all_gather({"kernel": kernel}, {"kernel": names})["kernel"]
        made = jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.sum(jnp.square(made.astype(jnp.float32)))

    kernel = jax.ShapeDtypeStruct((3, 3, 128, 128), jnp.bfloat16)
    kernel = jax.ShapeDtypeStruct(kernel.shape, kernel.dtype, sharding=sharding.storage_of(names, kernel.shape))
    images = jax.ShapeDtypeStruct((16 * 64, 64, 64, 128), jnp.bfloat16, sharding=NamedSharding(mesh, P(FSDP)))
    with without_cache():
        module = hlo.parse(jax.jit(jax.grad(loss)).lower(kernel, images).compile().as_text())
    found = program_cost.operations(module)
    moved = sum(one.times * one.bytes for one in found)
    assert moved < 0.3 * 2**30 if summed_whole else moved > 2 * 2**30, moved
    assert any(one.sent is not None and one.sent.kind == "collective-permute" for one in found) is not summed_whole
