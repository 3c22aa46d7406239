"""Builds arguments for the operators of the multiway ops, and defines tests that these ops share."""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from beit3_ds.kernels.ops.measured_op import CHOICES, Backend, MeasuredOp
from beit3_ds.kernels.ops.numerics import WrongResultError
from beit3_ds.kernels.ops.out_projection import out_projection_reference
from beit3_ds.kernels.ops.sub_norm import SubNorm
from beit3_ds.kernels.ops.up_projection import Activation
from tests.kernels.interpreter import interpreted

WIDTH, HIDDEN, EPSILON = 6, 4, 1e-5
CPU = torch.device("cpu")


class Problem:
    """Holds the inputs of one call of `out_projection`."""

    def __init__(self, lengths: list[int], dtype: torch.dtype = torch.float64) -> None:
        """Draws inputs for experts with the given numbers of rows."""
        generator = torch.Generator().manual_seed(sum(lengths) + 7 * len(lengths))

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

        stops = torch.tensor(lengths).cumsum(0).tolist()
        self.slices = [(stop - length, stop) for stop, length in zip(stops, lengths, strict=True)]
        rows, experts = sum(lengths), len(lengths)
        self.x, self.residual = draw(rows, WIDTH), draw(rows, HIDDEN)
        self.factor = torch.randint(0, 3, (rows,), generator=generator).to(dtype)
        shapes = {"weights": (HIDDEN, WIDTH), "biases": (HIDDEN,), "scales": (WIDTH,), "shifts": (WIDTH,)}
        self.parameters = {name: [draw(*shape) for _ in range(experts)] for name, shape in shapes.items()}
        self.leaves = [self.x, self.residual, *(p for group in self.parameters.values() for p in group)]

    def run(self, op: Callable[..., Tensor], gelu: bool, norm: SubNorm | None) -> list[Tensor]:
        """Returns the output, and the gradient of every input that was used."""
        x = self.x if op is out_projection_reference else Activation(self.x)
        stream = {"residual_TD": self.residual, "factor_T": self.factor}
        y = op(x, self.slices, self.parameters["weights"], self.parameters["biases"], gelu=gelu, norm=norm, **stream)
        upstream = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        leaves = self.leaves if norm else self.leaves[: -2 * len(self.slices)]
        return [y, *torch.autograd.grad((y * upstream).sum(), leaves)]

    def norm(self, by_operators: bool = False) -> SubNorm:
        """Returns the sub-LN; with `by_operators`, it runs as if ranks divided the rows.

        For this, it gets a group of one rank.
        """
        group = (lambda x: x.unsqueeze(0), lambda x: x) if by_operators else (None, None)
        return SubNorm(self.parameters["scales"], self.parameters["shifts"], EPSILON, WIDTH, *group)


def operator_calls(dtype: torch.dtype = torch.float64) -> dict[str, tuple[object, ...]]:
    """Returns arguments for every operator of linear layers and the FFN, by operator name."""
    problem = Problem([3, 0, 2], dtype)
    x, dy = problem.x.detach(), problem.residual.detach()
    weights, biases, scales, shifts = ([p.detach() for p in group] for group in problem.parameters.values())
    ends, factor, h = (3, 3, 5), problem.factor, torch.randn(5, WIDTH, dtype=x.dtype)
    mean, rstd = x.mean(1), torch.rand(5, dtype=x.dtype)
    sums = torch.randn(2, 5, dtype=x.dtype)
    dn, statistics = torch.randn(5, WIDTH, dtype=x.dtype), torch.stack((mean, rstd))
    return {
        "multiway_linear": (x, ends, weights, biases),
        "multiway_input_gradient": (dy, factor, ends, weights),
        "multiway_weight_gradient": (dy, factor, x, ends, True),
        "multiway_qkv": (x, ends, [w * (1 + i) for i, w in enumerate(weights * 3)], biases * 3),
        "multiway_qkv_input_gradient": (dy, dy + 1, dy + 2, ends, [w * (1 + i) for i, w in enumerate(weights * 3)]),
        "multiway_qkv_weight_gradient": (dy, dy + 1, dy + 2, x, ends),
        "row_statistics": (x, True),
        "activation_norm": (x, True, scales, shifts, EPSILON, ends),
        "activation_norm_backward": (dn, x, True, statistics, scales, ends),
        "sub_norm": (x, True, mean, rstd, scales, shifts, ends),
        "sub_norm_sums": (x, x, True, mean, rstd, scales, ends),
        "sub_norm_gradient": (x, x, True, mean, rstd, scales, sums, WIDTH, ends),
        "up_projection": (h, ends, weights, biases),
        "out_projection": (x, ends, weights, biases, dy, factor),
    }


def check_wrong_launch_is_found(
    op: ModuleType, launches: ModuleType, launch: str, result: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changes the first result of a launch by half a percent; the op's self-check must name that result."""
    right = getattr(launches, launch)

    def wrong(*arguments: Any, **options: Any) -> Any:
        results = right(*arguments, **options)
        next(flatten(results)).mul_(1.005)
        return results

    monkeypatch.setattr(launches, launch, wrong)
    with interpreted(), pytest.raises(WrongResultError, match=f"^{result}: error"):
        op.check_kernels(CPU, torch.float32)


def check_device_implementation(
    op: ModuleType, name: str, function: str, accepted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compares the implementations for GPU tensors with the CPU's, with kernels switched on and off."""
    monkeypatch.setattr(op.KERNELS, "accept", lambda x: accepted)
    operator = getattr(op, function)
    backends: tuple[Backend, ...] = ("triton", "library")
    for backend in backends:
        arguments = operator_calls(torch.float32)[name]
        expected = operator(*arguments)
        with pytest.MonkeyPatch.context() as patch, interpreted(), CHOICES.fixed(backend):
            select_on_cpu(operator, patch)
            ours = operator(*arguments)
        for mine, theirs in zip(flatten(ours), flatten(expected), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def select_on_cpu(operator: MeasuredOp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes an operator select an implementation for CPU tensors too, and forget its choices."""
    monkeypatch.setattr(operator, "_on_cpu", None)
    for known in ("_chosen", "_recent"):
        monkeypatch.setattr(operator, known, {})


def flatten(result: Any) -> Iterator[Tensor]:
    """Yields all tensors of a nested result."""
    if isinstance(result, Tensor):
        yield result
    else:
        for part in result:
            yield from flatten(part)
