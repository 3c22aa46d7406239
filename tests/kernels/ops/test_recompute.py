"""Compares layers that recompute their normalised input in the backward pass with layers that save it."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from beit3_ds.kernels.ops.multiway_layer_norm import multiway_layer_norm, recomputable_rows
from beit3_ds.kernels.ops.multiway_linear import multiway_linear
from beit3_ds.kernels.ops.recompute import Recomputable
from beit3_ds.kernels.ops.up_projection import up_projection

SLICES, WIDTH, EPSILON = [(0, 3), (3, 3), (3, 7)], 8, 1e-5
EXPERTS = len(SLICES)


def draw() -> list[Tensor]:
    """Draws the stream, the scale and shift of each expert, and the weights and biases of three layers."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, WIDTH), *[(WIDTH,)] * (2 * EXPERTS), *[(WIDTH, WIDTH), (WIDTH,)] * (3 * EXPERTS)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def run(x: Tensor, *parameters: Tensor, recomputes: bool) -> Tensor:
    """Runs a norm whose output three layers use, like queries, keys and the FFN."""
    scales, shifts = parameters[:EXPERTS], parameters[EXPERTS : 2 * EXPERTS]
    layers = parameters[2 * EXPERTS :]
    weights = [layers[start : 6 * EXPERTS : 6] for start in (0, 2, 4)]
    biases = [layers[start : 6 * EXPERTS : 6] for start in (1, 3, 5)]
    stream, h = multiway_layer_norm(x, SLICES, scales, shifts, EPSILON)
    recompute: Recomputable | None = recomputable_rows(x, SLICES, scales, shifts, EPSILON) if recomputes else None
    y = stream
    for w, b in zip(weights[:2], biases[:2], strict=True):
        y = y + multiway_linear(h, SLICES, w, b, recompute).sin()
    up = up_projection(h, SLICES, weights[2], biases[2], has_norm=False, recompute=recompute)
    return y + up.x_TF.cos()


def gradients(y: Tensor, leaves: list[Tensor], **options: bool) -> tuple[Tensor, ...]:
    upstream = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return torch.autograd.grad((y * upstream).sum(), leaves, **options)


def assert_equal(ours: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for mine, theirs in zip(ours, expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("checkpoints", [False, True])
def test_gradients_are_the_same_bit_by_bit(checkpoints: bool) -> None:
    """Catches rows that are released too early; differentiates twice, and some of the layers first.

    With checkpointing, also catches the use of tensors from the first forward pass.
    """
    leaves = draw()
    expected = gradients(run(*leaves, recomputes=False), leaves)
    if checkpoints:
        assert_equal(gradients(checkpoint(run, *leaves, recomputes=True, use_reentrant=False), leaves), expected)
        return
    y = run(*leaves, recomputes=True)
    for _ in range(2):
        torch.autograd.grad(y.sum(), leaves[-1], retain_graph=True)
        assert_equal(gradients(y, leaves, retain_graph=True), expected)


def test_rows_are_not_saved() -> None:
    """Catches a layer that still saves its input; the stream must be the only saved tensor of its size."""
    leaves, saved = draw(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        h = multiway_layer_norm(leaves[0], SLICES, leaves[1:4], leaves[4:7], EPSILON)[1]
        recompute = recomputable_rows(leaves[0], SLICES, leaves[1:4], leaves[4:7], EPSILON)
        multiway_linear(h, SLICES, leaves[7::2][:3], leaves[8::2][:3], recompute)
        up_projection(h, SLICES, leaves[7::2][:3], leaves[8::2][:3], has_norm=False, recompute=recompute)
    assert {tensor.data_ptr() for tensor in saved if tensor.shape == h.shape} == {leaves[0].data_ptr()}


def test_rows_are_recomputed_once_for_all_layers() -> None:
    leaves, computed = draw(), []
    recompute = recomputable_rows(leaves[0], SLICES, leaves[1:4], leaves[4:7], EPSILON)
    compute = recompute.function._compute
    recompute.function._compute = lambda *tensors: computed.append(compute(*tensors)) or computed[-1]
    h = multiway_layer_norm(leaves[0], SLICES, leaves[1:4], leaves[4:7], EPSILON)[1]
    y = sum(multiway_linear(h, SLICES, leaves[7::2][:3], leaves[8::2][:3], recompute) for _ in range(3))
    gradients(y, leaves[:1])
    assert len(computed) == 1 and torch.equal(computed[0], h) and recompute.function._rows_TD is None
