"""Layers that make their normalised input again in the backward pass, against layers that keep it."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from beit3_ds.kernels.ops.multiway_layer_norm import multiway_layer_norm, row_source
from beit3_ds.kernels.ops.multiway_linear import multiway_linear
from beit3_ds.kernels.ops.recompute import RowSource
from beit3_ds.kernels.ops.up_projection import up_projection

SLICES, WIDTH, EPSILON = [(0, 3), (3, 3), (3, 7)], 8, 1e-5
EXPERTS = len(SLICES)


def draw() -> list[Tensor]:
    """The stream, then each expert's scale and shift, and weight and bias of three layers."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, WIDTH), *[(WIDTH,)] * (2 * EXPERTS), *[(WIDTH, WIDTH), (WIDTH,)] * (3 * EXPERTS)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def run(x: Tensor, *parameters: Tensor, remakes: bool) -> Tensor:
    """A norm whose rows three layers take, as queries, keys and a GELU's input do."""
    scales, shifts = parameters[:EXPERTS], parameters[EXPERTS : 2 * EXPERTS]
    layers = parameters[2 * EXPERTS :]
    weights = [layers[start : 6 * EXPERTS : 6] for start in (0, 2, 4)]
    biases = [layers[start : 6 * EXPERTS : 6] for start in (1, 3, 5)]
    stream, h = multiway_layer_norm(x, SLICES, scales, shifts, EPSILON)
    source: RowSource | None = row_source(x, SLICES, scales, shifts, EPSILON) if remakes else None
    y = stream
    for w, b in zip(weights[:2], biases[:2], strict=True):
        y = y + multiway_linear(h, SLICES, w, b, source).sin()
    up = up_projection(h, SLICES, weights[2], biases[2], with_statistics=False, source=source)
    return y + up.x_TF.cos()


def gradients(y: Tensor, leaves: list[Tensor], **options: bool) -> tuple[Tensor, ...]:
    upstream = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return torch.autograd.grad((y * upstream).sum(), leaves, **options)


def assert_equal(ours: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for mine, theirs in zip(ours, expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("checkpoints", [False, True])
def test_gradients_are_the_same_bit_by_bit(checkpoints: bool) -> None:
    """Also a second time, and of a part of the layers first: catches rows that are let go of too early.

    And, under checkpointing, tensors of the first forward pass.
    """
    leaves = draw()
    expected = gradients(run(*leaves, remakes=False), leaves)
    if checkpoints:
        assert_equal(gradients(checkpoint(run, *leaves, remakes=True, use_reentrant=False), leaves), expected)
        return
    y = run(*leaves, remakes=True)
    for _ in range(2):
        torch.autograd.grad(y.sum(), leaves[-1], retain_graph=True)
        assert_equal(gradients(y, leaves, retain_graph=True), expected)


def test_rows_are_not_kept() -> None:
    """Catches a layer that keeps its input after all: the stream is the only tensor of its size that stays."""
    leaves, kept = draw(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        h = multiway_layer_norm(leaves[0], SLICES, leaves[1:4], leaves[4:7], EPSILON)[1]
        source = row_source(leaves[0], SLICES, leaves[1:4], leaves[4:7], EPSILON)
        multiway_linear(h, SLICES, leaves[7::2][:3], leaves[8::2][:3], source)
        up_projection(h, SLICES, leaves[7::2][:3], leaves[8::2][:3], with_statistics=False, source=source)
    assert {tensor.data_ptr() for tensor in kept if tensor.shape == h.shape} == {leaves[0].data_ptr()}


def test_rows_are_made_once_for_all_layers() -> None:
    leaves, made = draw(), []
    source = row_source(leaves[0], SLICES, leaves[1:4], leaves[4:7], EPSILON)
    make = source.recipe._make
    source.recipe._make = lambda *tensors: made.append(make(*tensors)) or made[-1]
    h = multiway_layer_norm(leaves[0], SLICES, leaves[1:4], leaves[4:7], EPSILON)[1]
    y = sum(multiway_linear(h, SLICES, leaves[7::2][:3], leaves[8::2][:3], source) for _ in range(3))
    gradients(y, leaves[:1])
    assert len(made) == 1 and torch.equal(made[0], h) and source.recipe._rows_TD is None
