"""Measures how evenly the visual tokenizer uses its codes."""

# V codes in the codebook.

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from beit3_ds.parallel import Mesh

_LOW_USAGE = 0.5  # BEiT v2 reports 97 to 100% on ImageNet; below a half the codebook has collapsed or is too large
_CODES_PER_ENTRY = 16  # patches per codebook entry below which the usage is not reliable


@dataclass(frozen=True, kw_only=True)
class CodeUsage:
    """Describes how evenly the codes of the codebook are used in a set of images."""

    num_codes: int
    """Number of codes that occur at least once."""
    codebook_size: int
    """Number of codes in the codebook."""
    perplexity: float
    """exp(entropy) of the code frequencies, between 1 and `codebook_size`."""
    num_seen: int
    """Number of patches counted; each patch has one code."""

    def __str__(self) -> str:
        return f"{self.num_codes} of {self.codebook_size} codes used, perplexity {self.perplexity:.0f}"

    @property
    def is_low(self) -> bool:
        """Returns whether fewer than half of the codes are used; False if too few patches were counted to judge."""
        enough = self.num_seen >= _CODES_PER_ENTRY * self.codebook_size
        return enough and self.num_codes < _LOW_USAGE * self.codebook_size

    def describe_if_low(self) -> str:
        """Returns a warning with remedies if `is_low`; otherwise an empty string."""
        if not self.is_low:
            return ""
        return (
            f"only {self}: most of the MIM head would learn nothing. Use a smaller codebook_size (with "
            "model.visual_vocab_size), more varied images, a lower learning_rate, or more continuous_steps before the "
            "codebook starts."
        )


class CodeCounter:
    """Counts how often each code occurs. The counts are on a device, and only `usage` and `has_codes` wait for the
    device.
    """

    def __init__(self, codebook_size: int, device: torch.device | str = "cpu") -> None:
        self._counts = torch.zeros(codebook_size, dtype=torch.int64, device=device)

    @property
    def has_codes(self) -> bool:
        """Returns whether any codes were counted."""
        return bool(self._counts.any())

    def to(self, device: torch.device) -> None:
        """Moves the counts to a device."""
        self._counts = self._counts.to(device)

    def add(self, codes: Tensor) -> None:
        """Counts codes, a tensor of any shape, int64 in [0, codebook_size)."""
        codes = codes.flatten()
        self._counts.index_add_(0, codes, torch.ones_like(codes))

    def add_counts(self, counts_V: Tensor) -> None:
        """Adds the number of occurrences of each code, (codes,) of any dtype."""
        self._counts += counts_V.to(torch.int64)

    def clear(self) -> None:
        """Resets the counts to zero."""
        self._counts.zero_()

    def usage(self, mesh: Mesh | None = None) -> CodeUsage:
        """Returns the usage of the counted codes; at least one code must have been counted.

        Args:
            mesh: mesh of all ranks. The counts are summed over the data-parallel ranks, and all ranks must call the
                method. None uses only the counts of this process.
        """
        own = self._counts.cpu()
        counts = (own if mesh is None else mesh.data_host.sum(own)).double()
        shares = counts[counts > 0] / counts.sum()
        perplexity = math.exp(-(shares * shares.log()).sum().item())
        return CodeUsage(
            num_codes=len(shares), codebook_size=len(counts), perplexity=perplexity, num_seen=int(counts.sum())
        )


def measure_code_usage(batches: Iterable[Tensor], codebook_size: int, mesh: Mesh | None = None) -> CodeUsage:
    """Returns the usage of the codes in all batches.

    Args:
        batches: codes of each batch, a tensor of any shape, int64 in [0, codebook_size).
        codebook_size: number of codes in the codebook.
        mesh: mesh of all ranks. The counts are summed over the data-parallel ranks, and all ranks must call the
            function. None counts only the batches of this process.
    """
    counter: CodeCounter | None = None
    for codes in batches:
        counter = counter or CodeCounter(codebook_size, codes.device)
        counter.add(codes)
    assert counter is not None, "no codes to count"
    return counter.usage(mesh)
