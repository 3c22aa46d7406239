"""The rule that holds kernels to a reference: at most twice the error of the reference in the kernels' own dtype."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]
"""Outputs, and gradients where there are some, from inputs of one floating dtype."""


def check_rule(names: Sequence[str], results: Sequence[Tensor], function: Function, inputs: Sequence[Tensor]) -> None:
    """Compares the results of a kernel with a function of the same inputs in float64.

    On a handful of values the reference may hit the truth by chance, or because what it subtracts is equal to the bit.
    Eight roundings to float32 of the largest number that takes part count as its error, too.

    Args:
        names: of the results, for the message.
        results: what the kernel made of the inputs, of the inputs' dtype or float32.
        function: the reference.
        inputs: of the kernel's dtype.
    """
    truths, same_dtype = function(*(x.double() for x in inputs)), function(*inputs)
    largest = max(x.abs().max().item() for x in (*inputs, *truths) if x.numel())
    floor = 8 * torch.finfo(torch.float32).eps * largest
    for name, result, truth, theirs in zip(names, results, truths, same_dtype, strict=True):
        assert result.shape == truth.shape, f"{name}: shape {tuple(result.shape)} instead of {tuple(truth.shape)}"
        assert result.dtype in (inputs[0].dtype, torch.float32), f"{name}: {result.dtype}"
        if result.numel() == 0:
            continue
        allowed = 2 * (theirs - truth).abs().max() + floor
        error = (result - truth).abs().max()
        assert error <= allowed, f"{name}: error {error:.3g} > {allowed:.3g}"
