"""Tests which rows the row-streaming GPU kernels accept."""

import torch

from beit3_ds.kernels.ops.expert_rows import fits_kernels, row_lengths


def test_row_lengths() -> None:
    assert row_lengths((3, 3, 5)) == [3, 0, 2]


def test_a_cpu_has_no_kernels() -> None:
    assert not fits_kernels(torch.randn(2, 8), torch.float32)
