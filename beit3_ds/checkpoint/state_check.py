"""Compares the optimizer's weights with the model's weights before a checkpoint is written.

A checkpoint saves the optimizer's weights.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

_SAMPLED_ELEMENTS = 4096
"""Minimum number of elements to compare between the optimizer's copy and the model's copy of a range of weights. The
elements are evenly spread over the range. Ranges with fewer elements are compared in full. This minimum suffices to
detect that one copy has the weights in another order."""


class HeldWeights(NamedTuple):
    """Holds two copies of a range of weights, and AdamW's averages for these weights.

    One copy is in the optimizer, and checkpoints save it. The other copy is in the model.
    """

    name: str
    """Name of the parameter in the whole model."""
    saved: Tensor
    """Values in the optimizer, (elements,) float32. A checkpoint saves these values."""
    held: Tensor
    """Values in the model's parameters, (elements,), in the parameters' dtype."""
    moments: tuple[Tensor, ...]
    """AdamW's averages of the gradient and of the squared gradient for these elements, (elements,) each."""


def find_mismatch(weights: Iterable[HeldWeights], step: int) -> str | None:
    """Compares some elements of the optimizer's weights with the model's weights; describes one range that differs.

    Args:
        weights: ranges to compare.
        step: number of steps so far; selects the compared elements.

    Returns:
        A short text with the tensor's name, and either how many elements differ or which sizes differ; None if all
        compared elements are equal.
    """
    names, differing, num_compared = [], [], []
    fault: str | None = None
    # Reads all ranges, because other ranks may gather later ranges together with this rank.
    for name, saved, held, moments in weights:
        if saved.shape != held.shape:
            fault = fault or f"{name} has {len(held)} elements in the model, but {len(saved)} in the optimizer"
        elif any(moment.shape != saved.shape for moment in moments):
            fault = fault or f"{name} has {len(saved)} weights, but moments of {[len(moment) for moment in moments]}"
        else:
            stride = max(1, len(saved) // _SAMPLED_ELEMENTS)
            ours, theirs = saved[step % stride :: stride], held[step % stride :: stride]
            ours = ours.to(held.device, held.dtype)
            differ = (ours != theirs) & ~(ours.isnan() & theirs.isnan())
            names.append(name)
            differing.append(differ.sum())
            num_compared.append(len(ours))
    # All counts are copied to the host at once, so that a GPU is synchronised only once.
    counts = torch.stack([count.to(differing[0].device) for count in differing]).tolist() if differing else []
    for name, count, compared in zip(names, counts, num_compared, strict=True):
        if count:
            return f"{count} of {compared} compared elements of {name} differ between model and optimizer"
    return fault
