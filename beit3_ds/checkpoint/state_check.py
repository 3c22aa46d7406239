"""Compares the weights that would be saved with the model's weights, before anything is written."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

_SAMPLED_ELEMENTS = 4096
"""Number of elements to compare per range, evenly spread; enough to detect that a buffer has another order."""


class HeldWeights(NamedTuple):
    """Holds two copies of a range of weights: the optimizer's, which checkpoints save, and the model's."""

    name: str
    """Name of the parameter in the whole model."""
    saved: Tensor
    """Values that a checkpoint would hold, in one dimension."""
    held: Tensor
    """Values of the same elements in the model's parameters, in the parameters' dtype."""
    moments: tuple[Tensor, ...]
    """AdamW's moments of the same elements: running averages of the gradient and of the squared gradient."""


def find_mismatch(weights: Iterable[HeldWeights], step: int) -> str | None:
    """Compares samples of the optimizer's and the model's values, and describes the first range where they differ.

    Args:
        weights: ranges to compare.
        step: number of updates done; chooses the samples.

    Returns:
        A short text with the tensor's name and the number of elements that differ; None if no range differs.
    """
    names, differing, num_compared = [], [], []
    fault: str | None = None
    for name, saved, held, moments in weights:  # to the end, because other ranks may gather later ranges with this one
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
