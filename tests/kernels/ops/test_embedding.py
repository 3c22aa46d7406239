"""Tests the lookup of rows in a table, and the gradient of the table."""

# S ids, V rows of the table, D width.

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_ds.kernels.ops.embedding import embedding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@given(st.lists(st.integers(0, 6), max_size=30))
@settings(deadline=None)
def test_embedding_and_its_gradient_are_torchs(dtype: torch.dtype, ids: list[int]) -> None:
    ids_S, weight_VD = torch.tensor(ids, dtype=torch.int64), torch.randn(7, 5).to(dtype).requires_grad_()
    d_SD = torch.randn(len(ids), 5).to(dtype)
    rows_SD = embedding(ids_S, weight_VD)
    assert torch.equal(rows_SD, F.embedding(ids_S, weight_VD))
    (gradient_VD,) = torch.autograd.grad(rows_SD, weight_VD, d_SD)
    assert gradient_VD.dtype is dtype
    truth_VD = torch.zeros(7, 5, dtype=torch.float64).index_add_(0, ids_S, d_SD.double())
    magnitude_VD = torch.zeros(7, 5, dtype=torch.float64).index_add_(0, ids_S, d_SD.double().abs())
    bound_VD = len(ids) * torch.finfo(dtype).eps * magnitude_VD  # a rounding for each addition, in any order
    assert bool(((gradient_VD - truth_VD).abs() <= bound_VD).all())


def test_an_id_outside_the_table_is_refused() -> None:
    with pytest.raises(IndexError):
        embedding(torch.tensor([7]), torch.randn(7, 5))
