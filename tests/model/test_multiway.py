"""Compares the last linear layer of a branch, divided over ranks with its sub-LN, with the undivided layer."""

import pytest
import torch
from torch import Tensor

from beit3_ds.config import ParallelConfig
from beit3_ds.kernels.ops.up_projection import Activation
from beit3_ds.model.multiway import MultiwaySubLayerNorm, RowParallelMultiwayLinear
from beit3_ds.parallel import TensorParallel, own_part
from tests.batches import random_batch, small_model_config
from tests.ranks import run_ranks

RANKS, WIDTH, HIDDEN, EPSILON = 3, 12, 8, 1e-5
EXPERTS = ("vision", "language")


def measure(offset: float, gelu: bool) -> list[tuple[Tensor, Tensor]]:
    """Returns pairs of actual and expected tensors of one rank: the output and all gradients."""
    from beit3_ds.runtime.process_group import init_process_group

    mesh = init_process_group(ParallelConfig(tensor_parallel_size=RANKS))
    batch = random_batch(small_model_config(), 1, 1, 2)
    torch.manual_seed(0)
    x = torch.randn(batch.num_rows, WIDTH) + offset
    stream, upstream = torch.randn(2, batch.num_rows, HIDDEN)
    factor = torch.randint(0, 3, (batch.num_rows,)).float()
    values: dict[str, Tensor] = {}
    results = []
    for tensor in (TensorParallel(), mesh.tensor):
        linear = RowParallelMultiwayLinear(WIDTH, HIDDEN, EXPERTS, tensor)
        norm = MultiwaySubLayerNorm(WIDTH, EPSILON, EXPERTS, tensor)
        named = [(f"{i}.{name}", p) for i, m in enumerate((linear, norm)) for name, p in m.named_parameters()]
        for name, parameter in named:
            values.setdefault(name, torch.randn(parameter.shape))
            parameter.data.copy_(own_part(parameter, values[name]))
        part = tensor.split(WIDTH, dim=1).take(x).clone().requires_grad_()
        residual = stream.clone().requires_grad_()
        y = linear(Activation(part), residual, factor, batch, gelu=gelu, norm=norm())
        results.append(
            (named, [y, *torch.autograd.grad((y * upstream).sum(), [part, residual, *(p for _, p in named)])])
        )
    (_, (y, d_x, d_residual, *expected)), (named, (*ours,)) = results
    split = mesh.tensor.split(WIDTH, dim=1)
    expected = [own_part(p, gradient) for (_, p), gradient in zip(named, expected, strict=True)]
    return list(zip(ours, [y, split.take(d_x), d_residual, *expected], strict=True))


@pytest.mark.parametrize(("offset", "gelu"), [(0.0, True), (300.0, False)])
def test_divided_over_ranks(offset: float, gelu: bool) -> None:
    """Compares outputs and gradients with those of the undivided layer, also for inputs with a large mean.

    In float32, E[x^2] - E[x]^2 has no correct digit if the mean is 300 and the variance 1. Also catches a bias,
    residual or factor that every rank adds, and statistics or sums over the columns of one rank.
    """
    for results in run_ranks(measure, RANKS, offset, gelu):
        for ours, expected in results:
            torch.testing.assert_close(ours, expected, rtol=2e-3, atol=2e-3 if offset else 1e-5)
