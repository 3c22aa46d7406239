"""Checks that a kernel's error is at most about twice the error of a PyTorch reference in the same dtype."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from beit3_ds.kernels.triton.architecture import EMULATED

Function = Callable[..., tuple[Tensor, ...]]
"""Function that takes floating-point tensors, and returns output tensors and, optionally, gradients."""


class WrongResultError(ArithmeticError):
    """Reports that a kernel's result has too large an error, or a wrong shape or dtype."""


def check_against_reference(
    names: Sequence[str], results: Sequence[Tensor], reference: Function, inputs: Sequence[Tensor]
) -> None:
    """Compares the results of a kernel with a reference that is computed in float64.

    The allowed error has two terms. The first is twice the error of the reference in the kernel's dtype. The second is
    eight times the float32 rounding error of the largest input or result. The second term is needed because, for few
    values, the reference in the kernel's dtype may be exact by chance.

    Args:
        names: name of each result, for the error message.
        results: results of the kernel. Each result must have the dtype of an input, or float32.
        reference: function that computes the same results from the inputs.
        inputs: inputs of the kernel. A residual stream may be float32 if the other inputs are in half precision.

    Raises:
        WrongResultError: if an error is too large, or if a result has a wrong shape or dtype. Never raised on an
            emulated GPU, whose kernels compute nothing (`fake_driver`).
    """
    if EMULATED.architecture is not None:
        return
    exact_results, reference_results = reference(*(x.double() for x in inputs)), reference(*inputs)
    largest = max(x.abs().max().item() for x in (*inputs, *exact_results) if x.numel())
    floor = 8 * torch.finfo(torch.float32).eps * largest
    for name, result, exact, rounded in zip(names, results, exact_results, reference_results, strict=True):
        if result.shape != exact.shape or result.dtype not in (torch.float32, *(x.dtype for x in inputs)):
            raise WrongResultError(f"{name} is {result.dtype} {tuple(result.shape)}, not of shape {tuple(exact.shape)}")
        if result.numel() == 0:
            continue
        allowed = 2 * (rounded - exact).abs().max() + floor
        error = (result - exact).abs().max()
        if not error <= allowed:  # also true if the error is NaN
            raise WrongResultError(f"{name}: error {error:.3g} > {allowed:.3g}")


def with_gradients(function: Callable[..., Tensor]) -> Function:
    """Returns a function that computes the output of `function` and the gradients of the input tensors.

    The returned function takes the input tensors, then the gradient of the output.
    """

    def differentiated(*inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs[:-1]]
        y = function(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, inputs[-1])

    return differentiated
