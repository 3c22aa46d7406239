"""Describes one op at one shape, with the implementations that `benchmark_kernels` compares."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    """Holds one implementation with its inputs; all implementations of a case compute the same."""

    leaves: tuple[Tensor, ...]
    """Inputs whose gradients are computed."""
    run: Callable[[], Tensor]
    """Runs the forward pass."""
    dy: Tensor
    """Gradient of the output."""
    packed: Callable[[Tensor], Tensor]
    """Reorders the output to the order of the packed stream, for comparisons."""


class Implementation(NamedTuple):
    """Describes this project's implementation or a baseline."""

    name: str
    """Name of its row in the table."""
    build: Callable[[], Problem] | None
    """Prepares the inputs; None if the implementation cannot run here."""
    why_absent: str = ""
    """Reason why the implementation cannot run here."""


class Cost(NamedTuple):
    """Holds the minimum work of an op."""

    flops: float
    """FLOPs of its matrix products; a multiply-add counts 2."""
    bytes: float
    """Bytes of inputs read and outputs written, once each."""


class Case(NamedTuple):
    """Describes one op at one shape."""

    op: str
    """Name of the op."""
    shape: str
    """Model size and number of rows."""
    forward: Cost
    """Cost of the forward pass."""
    backward: Cost
    """Cost of the backward pass without recomputation."""
    is_compute_bound: bool
    """Whether the op's rate counts FLOPs of products; otherwise it counts bytes."""
    implementations: list[Implementation]
    """Implementations; this project's comes first."""

    def cost(self, direction: str) -> Cost:
        """Returns the cost of a direction: "forward", "backward" or "both"."""
        if direction == "both":
            return Cost(self.forward.flops + self.backward.flops, self.forward.bytes + self.backward.bytes)
        return self.forward if direction == "forward" else self.backward

    def absent(self) -> list[tuple[str, str]]:
        """Returns the baselines that cannot run here, with reasons."""
        return [(entry.name, entry.why_absent) for entry in self.implementations if entry.build is None]


def random_tensor(*shape: int, device: torch.device, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Draws normal values, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)


def as_leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Returns copies that require gradients."""
    return tuple(x.detach().clone().requires_grad_() for x in tensors)
