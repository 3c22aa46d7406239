"""Tests the error bound of kernels."""

import pytest
import torch

from beit3_ds.kernels.ops.numerics import WrongResultError, check_against_reference, with_gradients


def test_nan_and_wrong_shapes_are_found() -> None:
    with pytest.raises(WrongResultError, match="y: error nan"):
        check_against_reference(("y",), (torch.tensor([torch.nan]),), lambda x: (x,), (torch.ones(1),))
    with pytest.raises(WrongResultError, match=r"y is torch.float32 \(1, 1\)"):
        check_against_reference(("y",), (torch.ones(1, 1),), lambda x: (x,), (torch.ones(1),))


def test_errors_of_the_reference_count_twice() -> None:
    """Catches a bound that is absolute, or that does not depend on the dtype."""
    x = torch.full((4,), 1.003, dtype=torch.bfloat16)
    check_against_reference(("y",), (x * x,), lambda x: (x * x,), (x,))
    with pytest.raises(WrongResultError, match="y: error"):
        check_against_reference(("y",), (x * x * 1.03,), lambda x: (x * x,), (x,))


def test_gradients_follow_the_output() -> None:
    x, dy = torch.tensor([3.0]), torch.tensor([2.0])
    assert [value.item() for value in with_gradients(torch.square)(x, dy)] == [9.0, 12.0]
