"""Rings of neighbors along `seq` on described TPU slices."""

import itertools

import jax
import numpy as np
import pytest
from jax.experimental import mesh_utils

from jvgen.parallel.mesh import MeshConfig, make_mesh
from jvgen.parallel.torus import Torus, closed_path
from jvgen.preflight import topology

needs_compiler = pytest.mark.skipif(not topology.has_compiler(), reason="libtpu, the TPU compiler, is not installed")


@pytest.mark.parametrize("rows,columns", [(2, 2), (2, 4), (4, 2), (4, 4), (2, 3), (6, 5)])
def test_a_closed_path_visits_every_square_once(rows, columns):
    path = closed_path(rows, columns)
    assert sorted(path) == list(itertools.product(range(rows), range(columns)))
    for here, there in zip(path, [*path[1:], path[0]], strict=True):
        assert abs(here[0] - there[0]) + abs(here[1] - there[1]) == 1


@needs_compiler
@pytest.mark.parametrize(
    "name,seq,hosts",
    [("v5e:2x4", 4, 1), ("v5e:8x16", 4, 1), ("v5e:16x16", 8, 2), ("v6e:16x16", 4, 1), ("v5p:4x4x4", 4, 2),
     ("v5p:4x4x4", 8, 2), ("v5p:2x2x4", 4, 1), ("v5p:4x4x8", 8, 8)],
)  # fmt: skip
def test_sequence_axes_are_rings_of_neighbors(name, seq, hosts):
    devices = topology.describe(name).devices
    mesh = make_mesh(MeshConfig(seq=seq), devices)
    torus = Torus.of(devices)
    rings = mesh.devices.reshape(-1, seq)
    assert all(torus.is_ring(ring) for ring in rings) and set(mesh.devices.flat) == set(devices)
    assert {len({device.process_index for device in ring}) for ring in rings} == {hosts}


@needs_compiler
def test_what_is_a_ring_already_and_pairs_are_laid_as_jax_lays_them():
    for name, seq in (("v5p:4x4x4", 4), ("v5e:16x16", 16), ("v5e:8x16", 2), ("v5e:8x16", 1)):
        devices = topology.describe(name).devices
        mesh = make_mesh(MeshConfig(seq=seq), devices)
        plain = mesh_utils.create_device_mesh(mesh.devices.shape, list(devices), allow_split_physical_axes=True)
        assert np.array_equal(mesh.devices, plain)


@needs_compiler
def test_a_line_whose_ends_are_apart_is_no_ring():
    devices = topology.describe("v5e:8x16").devices
    plain = mesh_utils.create_device_mesh((32, 4), list(devices), allow_split_physical_axes=True)
    torus = Torus.of(devices)
    assert torus.closed == (False, True, False) and not torus.is_ring(plain[0])
    whole = mesh_utils.create_device_mesh((8, 16), list(devices))
    assert torus.is_ring(whole[0]) and not torus.is_ring(whole[:, 0])


@needs_compiler
def test_no_rectangle_fits_or_a_chip_has_two_devices():
    devices = topology.describe("v5e:2x2").devices
    assert Torus.of(devices).rectangles(8) is None and Torus.of(topology.describe("v5e:2x4").devices[:3]) is None
    cores = topology.describe("tpu7x:4x4x4").devices
    assert Torus.of(cores) is None and make_mesh(MeshConfig(seq=4), cores).shape["seq"] == 4


@needs_compiler
def test_slices_are_laid_one_by_one():
    devices = topology.describe("v5e:4x4", 2).devices
    mesh = make_mesh(MeshConfig(data=2, seq=4), devices)
    assert [{device.slice_index for device in half.flat} for half in mesh.devices] == [{0}, {1}]
    plain = mesh_utils.create_hybrid_device_mesh((1, 16, 1, 1), (2, 1, 1, 1), list(devices))
    assert np.array_equal(make_mesh(MeshConfig(data=2), devices).devices, plain)
    # fsdp crosses where data is too short.
    across = make_mesh(MeshConfig(seq=4), devices).devices.reshape(2, 16)
    assert [{device.slice_index for device in half} for half in across] == [{0}, {1}]


def test_other_devices_keep_their_order():
    assert list(make_mesh(MeshConfig(seq=4), jax.devices()).devices.flat) == jax.devices()
