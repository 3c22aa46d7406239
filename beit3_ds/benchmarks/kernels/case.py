"""Describes one op at one shape, with the implementations that `benchmark_kernels` compares."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    """Holds an implementation of an op that is ready to run, and the inputs on which it runs."""

    leaves: tuple[Tensor, ...]
    """Inputs that need gradients."""
    run: Callable[[], Tensor]
    """Function that runs the forward pass and returns the output."""
    dy: Tensor
    """Gradient of the output."""
    packed: Callable[[Tensor], Tensor]
    """Function that puts the output's rows into packed order, so that outputs can be compared."""


class Implementation(NamedTuple):
    """Describes one implementation of an op: this project's, or a baseline."""

    name: str
    """Name of the implementation in the table."""
    build: Callable[[], Problem] | None
    """Function that prepares inputs and returns a `Problem`, which is ready to run. None if this machine cannot run the
    implementation."""
    why_absent: str = ""
    """Reason why this machine cannot run the implementation; empty if the machine can."""


class Cost(NamedTuple):
    """Holds the minimum work of an op: FLOPs and bytes."""

    flops: float
    """FLOPs of the matrix products; a multiply-add counts as 2."""
    bytes: float
    """Bytes of all inputs and outputs, if each input is read once and each output is written once."""


class Case(NamedTuple):
    """Describes one op at one shape, with its implementations."""

    op: str
    """Name of the op."""
    shape: str
    """Model size, number of rows and other sizes, as text for the table."""
    forward: Cost
    """Cost of the forward pass."""
    backward: Cost
    """Cost of the backward pass without recomputation."""
    is_compute_bound: bool
    """Whether the rate of the op is given in FLOP/s. If false, the rate is given in bytes per second."""
    implementations: list[Implementation]
    """Implementations of the op, this project's first."""

    def cost(self, direction: str) -> Cost:
        """Returns the cost of a pass: "forward", "backward" or "both"."""
        if direction == "both":
            return Cost(self.forward.flops + self.backward.flops, self.forward.bytes + self.backward.bytes)
        return self.forward if direction == "forward" else self.backward

    def absent(self) -> list[tuple[str, str]]:
        """Returns the name and the reason of each baseline that this machine cannot run."""
        return [(entry.name, entry.why_absent) for entry in self.implementations if entry.build is None]


def random_tensor(*shape: int, device: torch.device, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Returns a tensor of normally distributed random values. A seed gives the same values on all devices."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)


def as_leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Returns copies of the tensors as leaves that require gradients."""
    return tuple(x.detach().clone().requires_grad_() for x in tensors)
