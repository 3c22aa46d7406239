"""The end of a branch against its reference, natively and by operators, forward and backward."""

from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from beit3_ds.kernels.ops import out_projection as out_module
from beit3_ds.kernels.ops import up_projection as up_module
from beit3_ds.kernels.ops.out_projection import out_projection, out_projection_reference
from beit3_ds.kernels.ops.sub_norm import SubNorm
from beit3_ds.kernels.ops.up_projection import Activation, up_projection

WIDTH, HIDDEN, EPSILON = 6, 4, 1e-5


class Problem:
    """Inputs of one call; `lengths` are the experts' rows."""

    def __init__(self, lengths: list[int], dtype: torch.dtype = torch.float64) -> None:
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
        """Output, and the gradient of every input that took part."""
        x = self.x if op is out_projection_reference else Activation(self.x)
        stream = {"residual_TD": self.residual, "factor_T": self.factor}
        y = op(x, self.slices, self.parameters["weights"], self.parameters["biases"], gelu=gelu, norm=norm, **stream)
        upstream = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        leaves = self.leaves if norm else self.leaves[: -2 * len(self.slices)]
        return [y, *torch.autograd.grad((y * upstream).sum(), leaves)]

    def norm(self, by_operators: bool = False) -> SubNorm:
        """The sub-LN; ranks that divide its width make operators of it, here a group of one."""
        group = (lambda x: x.unsqueeze(0), lambda x: x) if by_operators else (None, None)
        return SubNorm(self.parameters["scales"], self.parameters["shifts"], EPSILON, WIDTH, *group)


LENGTHS = st.lists(st.integers(0, 4), min_size=1, max_size=3)


@given(
    lengths=LENGTHS,
    gelu=st.booleans(),
    with_norm=st.booleans(),
    by_operators=st.booleans(),
    chunk_rows=st.sampled_from([1, 3, 512]),
)
@settings(max_examples=60, deadline=None)
def test_equals_reference(lengths: list[int], gelu: bool, with_norm: bool, by_operators: bool, chunk_rows: int) -> None:
    """Catches a wrong expert, a factor on the residual, a bias added twice, statistics of the wrong rows.

    And gradients of the last chunk of rows alone.
    """
    problem = Problem(lengths)
    expected = problem.run(out_projection_reference, gelu, problem.norm() if with_norm else None)
    with mock.patch.object(out_module, "_CHUNK_ROWS", chunk_rows):
        ours = problem.run(out_projection, gelu, problem.norm(by_operators) if with_norm else None)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("by_operators", [False, True])
def test_gradcheck(gelu: bool, by_operators: bool) -> None:
    problem = Problem([3, 0, 2])

    def call(x: Tensor, residual: Tensor, *p: Tensor) -> Tensor:
        norm = problem.norm(by_operators)._replace(scales=p[6:9], shifts=p[9:12])
        stream = {"residual_TD": residual, "factor_T": problem.factor}
        return out_projection(Activation(x), problem.slices, p[:3], p[3:6], gelu=gelu, norm=norm, **stream)

    assert torch.autograd.gradcheck(call, problem.leaves)


@pytest.mark.parametrize("by_operators", [False, True])
def test_a_float32_stream_beside_bf16_branches(by_operators: bool) -> None:
    """Catches a stream or a gradient of it that is rounded to bf16, and a branch's gradient that is not."""
    problem, exact = Problem([5, 0, 4], torch.bfloat16), Problem([5, 0, 4])
    for mine, theirs in zip(exact.leaves, problem.leaves, strict=True):
        with torch.no_grad():
            mine.copy_(theirs)
    problem.residual = (problem.residual.detach().float() + 1e-4).requires_grad_()
    with torch.no_grad():
        exact.residual.copy_(problem.residual)
    problem.leaves[1], problem.factor, exact.factor = problem.residual, problem.factor.float(), problem.factor.double()
    y, dx, d_residual, *rest = problem.run(out_projection, True, problem.norm(by_operators))
    expected = exact.run(out_projection_reference, True, exact.norm())
    assert (y.dtype, d_residual.dtype) == (torch.float32, torch.float32)
    assert {gradient.dtype for gradient in (dx, *rest)} == {torch.bfloat16}
    dropped = problem.factor == 0
    assert dropped.any() and torch.equal(y[dropped], problem.residual[dropped])
    upstream = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
    torch.testing.assert_close(d_residual.double(), upstream, rtol=1e-6, atol=1e-7)
    for found, truth in zip((y, dx, *rest), (expected[0], expected[1], *expected[3:]), strict=True):
        assert (found.double() - truth).norm() <= 0.02 * truth.norm() + 1e-6


def test_large_means_cancel_nothing() -> None:
    """E[x^2] - E[x]^2 leaves no digit of a variance of 1 beside a mean of 3000 in float32."""
    problem = Problem([40, 24], torch.float32)
    with torch.no_grad():
        problem.x += 3000
    exact = Problem([40, 24])
    exact.factor = problem.factor.double()
    for mine, theirs in zip(exact.leaves, problem.leaves, strict=True):
        with torch.no_grad():
            mine.copy_(theirs)
    expected = exact.run(out_projection_reference, False, exact.norm())
    for by_operators in (False, True):
        for mine, theirs in zip(problem.run(out_projection, False, problem.norm(by_operators)), expected, strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=1e-2, atol=1e-2)


def test_the_input_alone_is_kept() -> None:
    """Catches an activation, or normalised rows, that autograd would keep beside it."""
    problem, kept = Problem([5, 3]), []
    pack = lambda tensor: kept.append(tensor) or tensor  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        problem.run(out_projection, True, problem.norm())
    wide = [tensor for tensor in kept if tensor.shape == problem.x.shape]
    assert len(wide) == 1 and wide[0].data_ptr() == problem.x.data_ptr()


def operator_calls(dtype: torch.dtype = torch.float64) -> dict[str, tuple[object, ...]]:
    """Arguments of every operator."""
    problem = Problem([3, 0, 2], dtype)
    x, dy = problem.x.detach(), problem.residual.detach()
    weights, biases, scales, shifts = ([p.detach() for p in group] for group in problem.parameters.values())
    ends, factor, h = [3, 3, 5], problem.factor, torch.randn(5, WIDTH, dtype=x.dtype)
    mean, rstd = x.mean(1), torch.rand(5, dtype=x.dtype)
    sums = torch.randn(2, 5, dtype=x.dtype)
    return {
        "multiway_linear": (x, ends, weights, biases),
        "multiway_input_gradient": (dy, factor, ends, weights),
        "multiway_weight_gradient": (dy, factor, x, ends, True),
        "row_statistics": (x,),
        "sub_norm": (x, True, mean, rstd, scales, shifts, ends),
        "sub_norm_sums": (x, x, True, mean, rstd, scales, ends),
        "sub_norm_gradient": (x, x, True, mean, rstd, scales, sums, WIDTH, ends),
        "up_projection": (h, ends, weights, biases, True),
        "out_projection": (x, mean, rstd, scales, shifts, ends, weights, biases, dy, factor),
    }


@pytest.mark.parametrize("name", operator_calls())
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.beit3_ds, name).default, operator_calls()[name])


@pytest.mark.parametrize("with_norm", [False, True])
def test_ffn_as_on_a_device(with_norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of CUDA tensors through both projections: catches an activation or statistics of other rows."""
    for module in (up_module, out_module):
        monkeypatch.setattr(module, "_runs_kernels", lambda x: True)
    problem = Problem([3, 0, 2])
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(5, HIDDEN, generator=generator, dtype=torch.float64, requires_grad=True)
    shapes = [(WIDTH, HIDDEN)] * 3 + [(WIDTH,)] * 3
    up = [torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    norm = problem.norm() if with_norm else None
    activation = up_projection(h, problem.slices, up[:3], up[3:], with_statistics=with_norm)
    assert activation.a_TF is not None and (activation.statistics is not None) == with_norm
    x = torch.cat([F.linear(h[i:j], up[k], up[3 + k]) for k, (i, j) in enumerate(problem.slices)])
    leaves = [h, *up, *problem.leaves[1 : None if with_norm else -6]]
    results = []
    given: tuple[tuple[Callable[..., Tensor], object], ...] = (
        (out_projection, activation),
        (out_projection_reference, x),
    )
    for op, start in given:
        linear = problem.parameters["weights"], problem.parameters["biases"]
        stream = {"residual_TD": problem.residual, "factor_T": problem.factor}
        y = op(start, problem.slices, *linear, gelu=True, norm=norm, **stream)
        upstream = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        results.append([y, *torch.autograd.grad((y * upstream).sum(), leaves)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_up_projection() -> None:
    """On the CPU it is the linear layer alone; the operator also activates."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(5, WIDTH, generator=generator, dtype=torch.float64)
    weights = [torch.randn(8, WIDTH, generator=generator, dtype=h.dtype) for _ in range(2)]
    biases = [torch.randn(8, generator=generator, dtype=h.dtype) for _ in range(2)]
    expected = torch.cat([F.linear(h[:3], weights[0], biases[0]), F.linear(h[3:], weights[1], biases[1])])
    activation = up_projection(h, [(0, 3), (3, 5)], weights, biases, with_statistics=True)
    torch.testing.assert_close(activation.x_TF, expected)
    x, a, mean, squares = torch.ops.beit3_ds.up_projection(h, [3, 5], weights, biases, True)
    variance, means = torch.var_mean(F.gelu(expected), 1, correction=0)
    for mine, theirs in zip((x, a, mean, squares), (expected, F.gelu(expected), means, variance * 8), strict=True):
        torch.testing.assert_close(mine, theirs)
