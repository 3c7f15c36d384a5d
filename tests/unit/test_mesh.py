"""Meshes: valid sizes, invalid sizes and their messages, the table of chips."""

import jax
import pytest

from jvgen.parallel.chips import chip_named, chip_of
from jvgen.parallel.mesh import MESH_AXES, MeshConfig, describe, make_mesh, single_device_mesh, slow_axis_warning


def test_rest_of_the_devices():
    mesh = make_mesh(MeshConfig(data=2, fsdp=-1, tensor=2))
    assert mesh.axis_names == MESH_AXES
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "seq": 1, "tensor": 2}
    assert describe(mesh) == "mesh data 2 x fsdp 2 x seq 1 x tensor 2 = 8 devices (cpu)"


def test_neighbors_lie_along_the_last_axis():
    mesh = make_mesh(MeshConfig(fsdp=2, seq=2, tensor=2))
    assert [d.id for d in mesh.devices[0, 0, 0]] == [0, 1] and [d.id for d in mesh.devices[0, :, 0, 0]] == [0, 4]


def test_some_of_the_devices():
    assert make_mesh(MeshConfig(fsdp=-1), jax.devices()[:3]).shape["fsdp"] == 3
    assert single_device_mesh().size == 1


@pytest.mark.parametrize(
    "config,message",
    [
        (MeshConfig(fsdp=-1, seq=3), "multiple of 3 devices, but there are 8"),
        (MeshConfig(fsdp=4), "needs 4 devices, but there are 8"),
        (MeshConfig(data=-1, fsdp=-1), "data and fsdp are both -1"),
        (MeshConfig(tensor=0), "tensor = 0: a mesh axis has at least 1"),
    ],
)
def test_sizes_that_do_not_fit(config, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(config)


def test_parameters_that_would_pass_the_network_between_slices_in_every_layer():
    sizes = {"data": 1, "fsdp": 64, "seq": 4, "tensor": 1}
    assert "fsdp crosses 2 slices" in (told := slow_axis_warning(sizes, 2)) and "multiple of 2" in told
    assert slow_axis_warning(sizes | {"data": 2, "fsdp": 32}, 2) == "" == slow_axis_warning(sizes, 1)


def test_chips():
    assert chip_of("TPU v5 lite").name == "v5e" and chip_of("TPU v5").name == "v5p" and chip_of("TPU v5p").name == "v5p"
    assert chip_of("TPU7x").device_peak_flops == 1153.5e12
    assert chip_of("NVIDIA H200").peak_flops == 989e12 and chip_of("NVIDIA H100 80GB HBM3").hbm_bytes == 80e9
    # Cards of one name with other peaks or memory.
    assert chip_of("NVIDIA H100 PCIe").peak_flops == 756e12 and chip_of("NVIDIA H100 80GB HBM3").peak_flops == 989e12
    assert chip_of("NVIDIA H100 NVL").hbm_bytes == 94e9 and chip_of("NVIDIA A100-SXM4-40GB").hbm_bytes == 40e9
    assert chip_of(jax.devices()[0]) is None
    with pytest.raises(ValueError, match="'v9' is not known; the table has v4, v5e"):
        chip_named("v9")
