"""Defines the codebook of the visual tokenizer. Cosine similarity selects the nearest codes; moving averages update the
codes.

Follows BEiT v2 (Peng et al., 2022, arXiv:2208.06366, sec. 2.2 and 3.1), after VQ-VAE (van den Oord et al., 2017,
arXiv:1711.00937, appendix A.1).
"""

# M vectors of all images, V codes in the codebook, C width of a code.

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_KMEANS_ROUNDS = 10  # k-means rounds on the first batch (BEiT v2)
_CHUNK_ROWS = 16384  # vectors compared with the codebook at a time: 0.5 GiB of similarities to 8192 codes


class Quantized(NamedTuple):
    """Result of quantizing vectors."""

    vectors: Tensor
    """Vector of the nearest code for each input, (..., width). Gradients pass to the input unchanged
    (straight-through)."""
    distance: Tensor
    """Commitment loss per input, (...): mean squared difference from the code's vector. The code gets no gradient."""
    codes: Tensor
    """Index of the nearest code for each input, (...) int64."""


class Quantizer(nn.Module):
    """Replaces each vector by the nearest of `codebook_size` codes, which are unit vectors.

    The codebook is a buffer, and `start` initialises it with k-means. In training mode, each call adds every input
    vector to its nearest code's sum in `totals`. Once per step, `move_codes` moves every code towards the mean of the
    vectors in its sum. The division of a step into calls and ranks does not affect the result. The codebook and
    `totals` stay in float32 if the module is cast.

    Args:
        codebook_size: number of codes.
        codebook_dim: number of components per code.
        ema_decay: weight of the old code in an update, in [0, 1].
    """

    weight: Tensor
    cluster_size: Tensor
    started: Tensor
    totals: Tensor

    def __init__(self, codebook_size: int, codebook_dim: int, ema_decay: float) -> None:
        super().__init__()
        self.ema_decay = ema_decay
        self.register_buffer("weight", torch.zeros(codebook_size, codebook_dim))
        self.register_buffer("cluster_size", torch.zeros(codebook_size))
        self.register_buffer("started", torch.tensor(False))
        # Sums of the vectors of each code, then their number, since the last update.
        self.register_buffer("totals", torch.zeros(codebook_size, codebook_dim + 1), persistent=False)

    def nearest(self, vectors: Tensor) -> Tensor:
        """Returns the index of the nearest code for each vector.

        Args:
            vectors: unit vectors, (..., width) float32.

        Returns:
            Indices in [0, codebook_size), (...) int64.
        """
        return _nearest(vectors.flatten(0, -2), self.weight).view(vectors.shape[:-1])

    def forward(self, vectors: Tensor) -> Quantized:
        """Quantizes unit vectors, (..., width) float32; in training mode, also adds the vectors to `totals`."""
        codes = self.nearest(vectors.detach())
        quantized = F.embedding(codes, self.weight)
        if self.training:
            self.totals += _totals(vectors.detach().flatten(0, -2), codes.flatten(), len(self.weight))
        distance = (vectors - quantized).square().mean(-1)
        return Quantized(vectors + (quantized - vectors).detach(), distance, codes)

    @torch.no_grad()
    def start(self, vectors_MC: Tensor) -> None:
        """Initialises the codebook with cosine k-means over unit vectors, (vectors, width) float32; communicates
        nothing.
        """
        centers_VC = _draw_centers(vectors_MC, self.weight.shape[0])
        counts_V = vectors_MC.new_zeros(len(centers_VC))
        for _ in range(_KMEANS_ROUNDS):
            codes_M = _nearest(vectors_MC, centers_VC)
            centers_VC, counts_V = _mean_directions(_totals(vectors_MC, codes_M, len(centers_VC)), centers_VC)
        self.weight.copy_(centers_VC)
        self.cluster_size.copy_(counts_V)
        self.started.fill_(True)

    @torch.no_grad()
    def move_codes(self) -> None:
        """Moves each code towards the mean direction of the vectors that were nearest to it, and clears `totals`.

        The moved codes are normalised. A code that was nearest to no vector keeps its value. The caller must first sum
        `totals` over all ranks.
        """
        means_VC, counts_V = _mean_directions(self.totals, self.weight)
        moved_VC = F.normalize(self.weight.lerp(means_VC, 1 - self.ema_decay), dim=-1)
        # An unused code keeps its value bit for bit; rounding would let it drift.
        self.weight.copy_(torch.where(counts_V[:, None] > 0, moved_VC, self.weight))
        self.cluster_size.lerp_(counts_V, 1 - self.ema_decay)
        self.totals.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the buffers to another device with the module, but keeps their dtypes, because casts would round."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self


def _nearest(vectors_MC: Tensor, codebook_VC: Tensor) -> Tensor:
    # The nearest unit vector has the largest inner product. bfloat16 is too coarse where two products nearly tie.
    with torch.autocast(vectors_MC.device.type, enabled=False):
        return torch.cat([(rows @ codebook_VC.T).argmax(-1) for rows in vectors_MC.split(_CHUNK_ROWS)])


def _totals(vectors_MC: Tensor, codes_M: Tensor, num_codes: int) -> Tensor:
    """Returns one row per code, (codes, width + 1): the sum of the code's vectors, then the number of the code's
    vectors.
    """
    ones_M1 = vectors_MC.new_ones(len(vectors_MC), 1)
    totals = vectors_MC.new_zeros(num_codes, vectors_MC.shape[1] + 1)
    return totals.index_add_(0, codes_M, torch.cat([vectors_MC, ones_M1], dim=1))


def _mean_directions(totals: Tensor, fallback_VC: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the normalised mean vector per code, (codes, width), and the number of vectors per code, (codes,).

    A code without vectors gets its vector in `fallback_VC`.
    """
    sums_VC, counts_V = totals[:, :-1], totals[:, -1]
    return torch.where(counts_V[:, None] > 0, F.normalize(sums_VC, dim=-1), fallback_VC), counts_V


def _draw_centers(vectors_MC: Tensor, num_centers: int) -> Tensor:
    """Draws the initial centres of k-means from the vectors by k-means++ (Arthur and Vassilvitskii, 2007).

    Uniform draws would mostly choose patches of white background, which have equal vectors.
    """
    generator = torch.Generator().manual_seed(0)  # every rank draws the same centres from the same vectors
    picks = torch.rand(num_centers, generator=generator, dtype=torch.float64).to(vectors_MC.device)
    centers_VC = vectors_MC.new_empty(num_centers, vectors_MC.shape[1])
    distance_M = torch.ones(len(vectors_MC), dtype=torch.float64, device=vectors_MC.device)
    for index in range(num_centers):
        # The small term makes draws uniform once all distances are 0, if there are fewer distinct vectors than codes.
        cumulative_M = (distance_M + 1e-12).cumsum(0)
        chosen = torch.searchsorted(cumulative_M, picks[index] * cumulative_M[-1])
        centers_VC[index] = vectors_MC[chosen.clamp(max=len(vectors_MC) - 1)]
        distance_M = torch.minimum(distance_M, (1 - vectors_MC @ centers_VC[index]).clamp(min=0).double())
    return centers_VC
