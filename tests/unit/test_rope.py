"""Rotary and sin-cos positions, timestep embeddings and patches, against published numbers and definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.models.video_dit.config import VideoDiTConfig
from jvgen.models.video_dit.torch_map import to_diffusers_config
from jvgen.nn.embeddings import PatchEmbedding, sincos_positions, sinusoidal_timesteps, token_grid, unpatchify
from jvgen.nn.network import Network
from jvgen.nn.rope import RotaryGrid, crop_region, grid_coordinates, rotate, rotation


@pytest.mark.parametrize(
    "grid, region",
    [
        ((30, 45), ((0, 0), (30, 45))),
        ((48, 85), ((2, 0), (27, 45))),
        ((45, 30), ((0, 12), (30, 32))),
        ((32, 48), ((0, 0), (30, 45))),
        ((16, 16), ((0, 8), (30, 38))),
    ],
)
def test_crop_regions_as_published(grid, region):
    """Halves round to even: 12.5 columns to the left are 12, 7.5 are 8."""
    assert crop_region(grid, (30, 45)) == region


def test_last_row_of_a_cropped_grid_is_the_published_one():
    _, rows, columns = grid_coordinates((3, 48, 85), RotaryGrid.LINSPACE, (30, 45))
    assert rows[0] == 2.0 and rows[-1] == np.float32(26.4375)
    assert columns[0] == 0.0 and columns[-1] == pytest.approx(45 * 84 / 85)


def test_both_grids_agree_at_the_base_size():
    linspace, sliced = (
        rotation((2, 30, 45), head_width=64, kind=kind, base=(30, 45))
        for kind in (RotaryGrid.LINSPACE, RotaryGrid.SLICE)
    )
    np.testing.assert_allclose(linspace.cosine, sliced.cosine, atol=1e-5)


def test_rotation_of_adjacent_pairs_excludes_text_and_padding():
    by = rotation((2, 2, 3), head_width=16, kind=RotaryGrid.SLICE, base=(4, 4), before=3, after=1)
    x = jax.random.normal(jax.random.key(0), (1, 16, 2, 16))
    turned = np.asarray(rotate(x, by))
    np.testing.assert_array_equal(turned[:, :3], x[:, :3])
    np.testing.assert_array_equal(turned[:, -1], x[:, -1])
    # Token 3 + (1 * 2 + 1) * 3 + 2 is at frame 1, row 1, column 2; channels are 4 of time, 6 of rows, 6 of columns.
    row = 3 + (1 * 2 + 1) * 3 + 2
    values = np.asarray(x[0, row, 1]).reshape(8, 2)
    complex_values = values[:, 0] + 1j * values[:, 1]
    angles = np.concatenate(
        [1 * 10000.0 ** (-np.arange(2) / 2), 1 * 10000.0 ** (-np.arange(3) / 3), 2 * 10000.0 ** (-np.arange(3) / 3)]
    )
    expected = complex_values * np.exp(1j * angles)
    actual = turned[0, row, 1].reshape(8, 2)
    np.testing.assert_allclose(actual[:, 0] + 1j * actual[:, 1], expected, atol=1e-5)


def test_head_widths_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="head_width = 24"):
        rotation((1, 1, 1), head_width=24, kind=RotaryGrid.SLICE, base=(4, 4))


def test_timesteps_have_cosines_first():
    """Numbers of the published code at timestep 999, width 1920."""
    values = np.asarray(sinusoidal_timesteps(jnp.asarray([999.0, 0.0]), 1920))
    np.testing.assert_allclose(values[0, [0, 1, 960, 1919]], [0.9996498, -0.9901626, -0.0264608, 0.1006921], atol=2e-5)
    np.testing.assert_array_equal(values[1], np.repeat([1.0, 0.0], 960))


def test_sincos_table_of_the_published_size():
    table = np.asarray(sincos_positions((13, 30, 45), 1920, spatial_scale=1.875), np.float64)
    assert table.shape == (13 * 30 * 45, 1920)
    assert table.sum() == pytest.approx(15_167_673.33, abs=1.0)
    assert np.abs(table).sum() == pytest.approx(18_987_505.17, abs=1.0)
    # Time, then column, then row: each constant along the other axes.
    grid = table.reshape(13, 30, 45, 1920)
    np.testing.assert_array_equal(grid[:, 0, 0, :480], grid[:, 7, 9, :480])
    np.testing.assert_array_equal(grid[0, 0, :, 480:1200], grid[5, 8, :, 480:1200])
    np.testing.assert_array_equal(grid[0, :, 0, 1200:], grid[5, :, 8, 1200:])
    assert grid[1, 0, 0, 0] == pytest.approx(np.sin(1.0)) and grid[0, 0, 1, 480] == pytest.approx(np.sin(1 / 1.875))


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 2, 3)])
def test_unpatchify_inverts_the_patches(patch):
    clip = jax.random.normal(jax.random.key(0), (2, 4, 6, 6, 3))
    size = patch[0] * patch[1] * patch[2] * 3

    def identity(key, shape, dtype):
        return jnp.eye(*shape, dtype=dtype)

    network = Network.of(lambda rngs: PatchEmbedding(3, size, patch=patch, kernel_init=identity, rngs=rngs))
    tokens = network.apply(network.init(jax.random.key(0)), clip)
    np.testing.assert_array_equal(unpatchify(tokens, token_grid((4, 6, 6), patch), patch), clip)


def test_grids_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="width = 7"):
        token_grid((4, 6, 7), (1, 2, 2))


def test_columns_have_a_scale_of_their_own():
    equal, wide = (np.asarray(sincos_positions((2, 3, 4), 32, spatial_scale=2.0, column_scale=s)) for s in (None, 0.5))
    rows = np.asarray(sincos_positions((2, 3, 16), 32, spatial_scale=2.0)).reshape(2, 3, 16, 32)[:, :, ::4]
    np.testing.assert_array_equal(wide.reshape(2, 3, 4, 32), rows)
    np.testing.assert_array_equal(equal, np.asarray(sincos_positions((2, 3, 4), 32, spatial_scale=2.0)))


def test_diffusers_has_one_scale_for_rows_and_columns():
    with pytest.raises(ValueError, match="column_scale = 2.0, spatial_scale = 1.875: diffusers has one scale"):
        to_diffusers_config(VideoDiTConfig(column_scale=2.0))
    assert to_diffusers_config(VideoDiTConfig(column_scale=1.875))["spatial_interpolation_scale"] == 1.875
