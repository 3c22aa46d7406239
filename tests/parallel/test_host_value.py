"""Tests that host values, packed as JSON and tensors, are unpacked unchanged."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Size, Tensor

from beit3_ds.parallel.host_value import allocate_tensors, as_bytes, pack, unpack

DTYPES = (torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float32, torch.float64)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    seed = draw(st.integers(0, 9))
    values = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 5
    values = values.to(draw(st.sampled_from(DTYPES)))
    if values.dim() and draw(st.booleans()):
        values = values[..., ::2]  # a tensor with at most one element counts as contiguous, whatever its stride
    return values.T if values.dim() == 2 and draw(st.booleans()) else values


# Surrogates represent bytes of a file name that are not UTF-8.
texts = st.text(st.characters(), max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts | tensors() | st.just(Size([2, 3])),
    lambda inner: (
        st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple) | st.dictionaries(texts, inner, max_size=4)
    ),
    max_leaves=12,
)


def equal(first: Any, second: Any) -> bool:
    if type(first) is not type(second):
        return False
    if isinstance(first, Tensor):
        return first.dtype == second.dtype and first.shape == second.shape and torch.equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return bool(first == second) or first != first


@given(values)
@settings(max_examples=200, deadline=None)
def test_values_come_back_as_they_were(value: Any) -> None:
    """Catches tuples and sizes that become lists, and tensors whose dtype, order or strides change."""
    header, tensors = pack(value)
    arriving = allocate_tensors(header)
    for target, source in zip(arriving, tensors, strict=True):
        as_bytes(target).copy_(as_bytes(source))
    assert equal(unpack(header, arriving), value)


class Named(tuple):
    """Implements a subclass of tuple; unpacking would return a plain tuple."""


@pytest.mark.parametrize(
    "value", [Named((1,)), {1: 2}, {"set": {1}}, [object()], b"bytes", torch.empty(1, device="meta")]
)
def test_what_would_change_is_refused(value: Any) -> None:
    with pytest.raises(TypeError):
        pack(value)
