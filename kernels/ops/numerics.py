"""The rule that holds kernels to a reference: at most twice the error of the reference in the kernels' own dtype."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]
"""Outputs, and gradients where there are some, from inputs of one floating dtype."""


class WrongResultError(ArithmeticError):
    """A kernel's result is farther from the truth than the rule allows."""


def check_rule(names: Sequence[str], results: Sequence[Tensor], function: Function, inputs: Sequence[Tensor]) -> None:
    """Compares the results of a kernel with a function of the same inputs in float64.

    On few values the reference may be exact by chance, or because it subtracts equal numbers. So eight float32
    roundings of the largest number involved are added to its error.

    Args:
        names: names of the results, for the message.
        results: the kernel's results, of an input's dtype or float32.
        function: the reference.
        inputs: inputs of the kernel's dtype, or float32 for a stream beside parameters of another dtype.

    Raises:
        WrongResultError: if the rule is broken, or a result has another shape or dtype.
    """
    truths, same_dtype = function(*(x.double() for x in inputs)), function(*inputs)
    largest = max(x.abs().max().item() for x in (*inputs, *truths) if x.numel())
    floor = 8 * torch.finfo(torch.float32).eps * largest
    for name, result, truth, theirs in zip(names, results, truths, same_dtype, strict=True):
        if result.shape != truth.shape or result.dtype not in (torch.float32, *(x.dtype for x in inputs)):
            raise WrongResultError(f"{name} is {result.dtype} {tuple(result.shape)}, not of shape {tuple(truth.shape)}")
        if result.numel() == 0:
            continue
        allowed = 2 * (theirs - truth).abs().max() + floor
        error = (result - truth).abs().max()
        if not error <= allowed:  # also where it is NaN
            raise WrongResultError(f"{name}: error {error:.3g} > {allowed:.3g}")


def with_gradients(function: Callable[..., Tensor]) -> Function:
    """Makes of a function of some tensors one of these and the output's gradient: output, and gradient of each."""

    def differentiated(*inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs[:-1]]
        y = function(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, inputs[-1])

    return differentiated
