"""How long operations take: hand-made ones on described chips, against arithmetic."""

import dataclasses

import numpy as np
import pytest
from jax.sharding import Mesh

from jvgen.parallel.chips import chip_named
from jvgen.parallel.pods import slice_of, wraps
from jvgen.preflight.kernel_cycles import Bundles, Grid, Kernel
from jvgen.preflight.program_cost import Kind, Operation, Phase, Sent
from jvgen.preflight.time_estimate import BANDWIDTH_SHARE, HOP, PEAK_SHARE, estimate

V5P = chip_named("v5p")


@dataclasses.dataclass(frozen=True)
class Device:
    """A chip at a place of a torus."""

    id: int
    coords: tuple[int, ...]
    slice_index: int = 0


def torus(*shape: int, sizes=(("data", 1), ("fsdp", 16), ("seq", 4)), slices=1) -> Mesh:
    """A mesh over the chips of slices, in the order of their places."""
    places = [(index, place) for index in range(slices) for place in np.ndindex(*shape)]
    devices = [Device(number, place, index) for number, (index, place) in enumerate(places)]
    array = np.array(devices, dtype=object).reshape([size for _, size in sizes])
    # `Mesh` takes real devices only.
    made = object.__new__(Mesh)
    object.__setattr__(made, "devices", array)
    object.__setattr__(made, "axis_names", tuple(name for name, _ in sizes))
    return made


def operation(kind: Kind, **changes) -> Operation:
    return Operation("one", kind, Phase.FORWARD, times=1, **changes)


def seconds_of(*operations: Operation, kernels=None, mesh=None):
    found = estimate(operations, kernels or {}, V5P, mesh or torus(4, 4, 4), useful_flops=1e12)
    return found, found.seconds


def test_products_are_bound_by_the_matrix_unit():
    _, time = seconds_of(operation(Kind.PRODUCT, flops=459e12, bytes=1e9, cycles=2 * 1_750_000_000))
    assert time.least == pytest.approx(1 / PEAK_SHARE) and time.most == 2
    assert time.likely == pytest.approx((time.least + time.most) / 2)


def test_elementwise_operations_are_bound_by_memory():
    _, time = seconds_of(operation(Kind.ELEMENTWISE, bytes=2765e9, cycles=4 * 1_750_000_000))
    assert time.least == time.likely == pytest.approx(1 / BANDWIDTH_SHARE) and time.most == 2


def test_kernels_take_their_bundles_and_are_named_where_they_are_not_known():
    kernel = Kernel("one", Bundles(step=3500, row=0, use={}), Grid((2, 1000), (True, False)))
    found, time = seconds_of(operation(Kind.KERNEL), kernels={"one": kernel})
    assert time.likely == pytest.approx(1000 * 3500 / 1.75e9) and found.cycles == {"one": 3_500_000}
    found, time = seconds_of(operation(Kind.KERNEL))
    assert found.without_cycles == ("one",) and time.most == 0


GROUPS = {
    "seq": tuple(range(4)),
    "fsdp": tuple(range(0, 64, 4)),
    "pair": (0, 1),
}


@pytest.mark.parametrize(
    "group, kind, wire, least, likely",
    [
        ("seq", "all-gather", 3 / 4, 180e9, 180e9),  # a ring along one axis
        ("seq", "all-reduce", 2 * 3 / 4, 180e9, 180e9),
        ("seq", "all-to-all", 4 / 4, 180e9, 180e9),
        ("fsdp", "reduce-scatter", 15 / 16, 360e9, 180e9),  # two axes: one ring, or a ring along each
        ("pair", "all-gather", 1 / 2, 90e9, 90e9),
        ("pair", "collective-permute", 1, 90e9, 90e9),
    ],
)
def test_collectives_over_the_torus(group, kind, wire, least, likely):
    members = GROUPS[group]
    sent = Sent(kind, 9e9, members, len(members))
    found, time = seconds_of(operation(Kind.COLLECTIVE, sent=sent))
    hops = 1 if kind == "collective-permute" else len(members) / 2
    assert time.likely == pytest.approx(wire * 9e9 / likely + HOP * hops)
    assert time.least == pytest.approx(wire * 9e9 / least, rel=1e-3) and time.most >= time.likely
    (traffic,) = found.traffic
    assert traffic.axes == {"pair": "seq"}.get(group, group) and traffic.hidden == 0 and not traffic.network


def test_a_sum_over_the_torus_uses_the_links_of_its_rings():
    """Six rings in one direction each, as XLA's compiler says for 64 devices of a 4x4x4 torus."""
    whole = tuple(range(64))
    _, alone = seconds_of(operation(Kind.COLLECTIVE, sent=Sent("all-reduce", 9e9, whole, 64)))
    _, time = seconds_of(operation(Kind.COLLECTIVE, sent=Sent("all-reduce", 9e9, whole, 64, 6)))
    assert time.likely == pytest.approx(2 * 63 / 64 * 9e9 / 540e9, rel=1e-2) and time.likely < alone.likely / 2
    assert time.most == alone.most


def test_what_leaves_the_slice_goes_over_the_network():
    mesh = torus(2, 2, 1, sizes=(("data", 2), ("fsdp", 4), ("seq", 1)), slices=2)
    found, time = seconds_of(operation(Kind.COLLECTIVE, sent=Sent("all-reduce", 6.25e9, (0, 4), 2)), mesh=mesh)
    assert time.likely == 1 and found.traffic[0].network and found.traffic[0].axes == "data"


def test_a_collective_is_hidden_behind_what_runs_before_its_end():
    sent = Sent("all-gather", 9e9, GROUPS["seq"], 4)
    gather = 0.75 * 9e9 / 180e9 + 2 * HOP
    start = dataclasses.replace(operation(Kind.COLLECTIVE, sent=sent, is_start=True), name="start")
    end = dataclasses.replace(operation(Kind.TRANSFER, start="start"), name="done")
    work = operation(Kind.ELEMENTWISE, bytes=0.6 * gather * 2765e9 * BANDWIDTH_SHARE)
    after, _ = seconds_of(start, end, work, work)
    beside, _ = seconds_of(start, work, end, work)
    covered, _ = seconds_of(start, work, work, end)
    assert after.traffic[0].hidden == 0 and after.seconds.likely == pytest.approx(2.2 * gather)
    assert beside.traffic[0].hidden == pytest.approx(0.6 * gather) and beside.seconds.likely == pytest.approx(
        1.6 * gather
    )
    assert covered.traffic[0].hidden == pytest.approx(gather) and covered.seconds.likely == pytest.approx(1.2 * gather)


def test_frozen_networks_and_the_update_are_parts_of_their_own():
    frozen = dataclasses.replace(operation(Kind.PRODUCT, flops=459e12), phase=Phase.FROZEN)
    update = dataclasses.replace(operation(Kind.ELEMENTWISE, bytes=2765e9), phase=Phase.UPDATE)
    found, _ = seconds_of(frozen, update)
    assert set(found.parts) == {"frozen networks", "optimizer, EMA and the rest"}


def test_utilization_is_of_useful_work():
    found, time = seconds_of(operation(Kind.ELEMENTWISE, bytes=2765e9))
    assert found.utilization[1] == pytest.approx(1e12 / (459e12 * time.likely))


def test_rings_and_names_of_slices():
    assert wraps("v5p", (4, 4, 8), 2) and not wraps("v5p", (2, 2, 1), 0)
    assert wraps("v5e", (8, 16), 1) and not wraps("v5e", (8, 16), 0)
    assert slice_of("v5p:4x4x8") == "v5p:4x4x8 has 128 chips (Cloud TPU v5p-256)"
    assert slice_of("v6e:16x16") == "v6e:16x16 has 256 chips (Cloud TPU v6e-256)"
    assert slice_of("tpu7x:4x4x4") == "tpu7x:4x4x4 has 64 chips"
