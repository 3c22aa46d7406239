"""Tests resampling of positions to another grid."""

import torch

from beit3_ds.positions import interpolate_positions


def test_interpolated_positions_stay_where_they_are() -> None:
    rows = torch.arange(14.0).repeat_interleave(14)
    positions = torch.cat([torch.full((1,), 99.0), rows])[None, :, None]
    resized = interpolate_positions(positions, 28)
    assert resized[0, 0, 0] == 99  # the class token's is no place on the grid
    grid = resized[0, 1:, 0].unflatten(0, (28, 28))
    torch.testing.assert_close(grid, grid[:, :1].expand(-1, 28))  # catches a transposed grid
    expected = (torch.arange(28) + 0.5) / 2 - 0.5  # centres of patches; catches aligned corners
    torch.testing.assert_close(grid[4:-4, 0], expected[4:-4], atol=0.05, rtol=0)
    assert torch.equal(interpolate_positions(positions, 14), positions)
