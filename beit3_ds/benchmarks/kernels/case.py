"""One op at one shape, with the implementations that `benchmark_kernels` compares."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    """One implementation with its inputs; all implementations of a case compute the same."""

    leaves: tuple[Tensor, ...]
    """What gradients are taken for."""
    run: Callable[[], Tensor]
    """The forward pass."""
    dy: Tensor
    """Gradient of its output."""
    packed: Callable[[Tensor], Tensor]
    """Makes the packed stream's order of its output, for the comparison."""


class Implementation(NamedTuple):
    """Ours or a baseline."""

    name: str
    """Its row."""
    build: Callable[[], Problem] | None
    """Prepares inputs; None if it cannot run here."""
    why_absent: str = ""
    """Why not."""


class Cost(NamedTuple):
    """The least that an op must do."""

    flops: float
    """Of its matrix products; a multiply-add counts 2."""
    bytes: float
    """Inputs read and outputs written, once each."""


class Case(NamedTuple):
    """One op at one shape."""

    op: str
    """The op."""
    shape: str
    """Size and rows."""
    forward: Cost
    """Of the forward pass."""
    backward: Cost
    """Of the backward pass, nothing recomputed."""
    is_compute_bound: bool
    """Whether its rate is that of products, or of bytes."""
    implementations: list[Implementation]
    """Ours first."""

    def cost(self, direction: str) -> Cost:
        """Of "forward", "backward" or "both"."""
        if direction == "both":
            return Cost(self.forward.flops + self.backward.flops, self.forward.bytes + self.backward.bytes)
        return self.forward if direction == "forward" else self.backward

    def absent(self) -> list[tuple[str, str]]:
        """Baselines that cannot run here, and why."""
        return [(entry.name, entry.why_absent) for entry in self.implementations if entry.build is None]


def random_tensor(*shape: int, device: torch.device, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal values, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)


def as_leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Copies that take gradients."""
    return tuple(x.detach().clone().requires_grad_() for x in tensors)
