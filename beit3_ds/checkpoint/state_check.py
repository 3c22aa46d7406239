"""Compares what a checkpoint would hold with what the model holds, before anything is written."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

_SAMPLED_ELEMENTS = 4096
"""Elements of a run that are compared, evenly spread: enough for any other order to show, and cheap."""


class HeldWeights(NamedTuple):
    """A run of elements as the optimizer holds it, and as the model does."""

    name: str
    """Logical name of the parameter."""
    saved: Tensor
    """What a checkpoint would hold, one dimension."""
    held: Tensor
    """What the model computes with: the same elements, rounded to its type."""
    moments: tuple[Tensor, ...]
    """AdamW's averages of the gradient and of its square, of the same elements."""


def find_mismatch(weights: Iterable[HeldWeights], step: int) -> str | None:
    """Finds the first run whose saved and held elements differ.

    Args:
        weights: the runs.
        step: updates done; the samples move with it.

    Returns:
        The tensor and how many of the compared elements differ, in a few words; None if there is no such run.
    """
    names, differing, num_compared = [], [], []
    fault: str | None = None
    for name, saved, held, moments in weights:  # to the end: other ranks may take part in gathering what follows
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
    # Counts come to the host together: a GPU is waited for once.
    counts = torch.stack([count.to(differing[0].device) for count in differing]).tolist() if differing else []
    for name, count, compared in zip(names, counts, num_compared, strict=True):
        if count:
            return f"{count} of {compared} compared elements of {name} differ between model and optimizer"
    return fault
