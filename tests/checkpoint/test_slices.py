"""Compares slices of a matrix with the elements that they should select."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from beit3_ds.checkpoint.slices import TensorSlice, matrix_shape, own_block, slice_range, whole_slice
from beit3_ds.parallel import Split

SHAPES = st.lists(st.integers(1, 6), max_size=3).map(torch.Size)


def numbered(shape: torch.Size) -> Tensor:
    """Returns a tensor with numbered elements, viewed as a matrix."""
    return torch.arange(shape.numel()).view(matrix_shape(shape))


def elements(matrix: Tensor, part: TensorSlice) -> Tensor:
    return matrix[part.top : part.bottom, part.left : part.right]


@st.composite
def parts(draw: st.DrawFn, shape: torch.Size) -> TensorSlice:
    """Draws a slice with at least one element."""
    rows, columns = matrix_shape(shape)
    top, left = draw(st.integers(0, rows - 1)), draw(st.integers(0, columns - 1))
    return TensorSlice(top, draw(st.integers(top + 1, rows)), left, draw(st.integers(left + 1, columns)))


@given(st.data(), SHAPES)
def test_a_range_is_at_most_three_slices_in_order(data: st.DataObject, shape: torch.Size) -> None:
    matrix, block = numbered(shape), data.draw(parts(shape))
    flat = elements(matrix, block).flatten()
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(flat) + 4)] * 2)))  # the end may be padding
    cut = list(slice_range(block, start, stop))
    assert len(cut) <= 3
    found = [number for _, part in cut for number in elements(matrix, part).flatten().tolist()]
    assert found == flat[start:stop].tolist()
    positions = [position for position, _ in cut]
    assert positions == [sum(part.num_elements for _, part in cut[:i]) for i in range(len(cut))]


@given(st.data(), SHAPES)
def test_intersections_hold_the_shared_elements(data: st.DataObject, shape: torch.Size) -> None:
    matrix, one, other = numbered(shape), data.draw(parts(shape)), data.draw(parts(shape))
    shared = set(elements(matrix, one).flatten().tolist()) & set(elements(matrix, other).flatten().tolist())
    common = one.intersection(other)
    assert (set() if common is None else set(elements(matrix, common).flatten().tolist())) == shared
    if common is not None:
        assert torch.equal(elements(matrix, one)[common.inside(one)], elements(matrix, common))
        assert common.shape == tuple(elements(matrix, common).shape)


def test_blocks_are_what_tensor_parallelism_leaves() -> None:
    shape = torch.Size((6, 4))
    assert own_block(shape, None) == whole_slice(shape) == TensorSlice(0, 6, 0, 4)
    assert own_block(shape, Split(dim=0, start=2, stop=4, size=6)) == TensorSlice(2, 4, 0, 4)
    assert own_block(shape, Split(dim=1, start=1, stop=3, size=4)) == TensorSlice(0, 6, 1, 3)
    assert whole_slice(torch.Size(())) == TensorSlice(0, 1, 0, 1)
    assert whole_slice(torch.Size((5,))) == TensorSlice(0, 5, 0, 1)


@given(st.data(), SHAPES, st.integers(1, 40))
def test_blocks_of_a_slice_follow_each_other(data: st.DataObject, shape: torch.Size, max_elements: int) -> None:
    matrix, part = numbered(shape), data.draw(parts(shape))
    blocks = list(part.blocks(max_elements))
    assert all(0 < block.num_elements <= max_elements for block in blocks)
    found = [number for block in blocks for number in elements(matrix, block).flatten().tolist()]
    assert found == elements(matrix, part).flatten().tolist()
