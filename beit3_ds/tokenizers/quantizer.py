"""Defines the visual tokenizer's codebook: nearest code by cosine, learnt by moving averages, not by gradients.

Follows BEiT v2 (Peng et al., 2022, arXiv:2208.06366, sec. 2.2 and 3.1), after VQ-VAE (van den Oord et al., 2017,
arXiv:1711.00937, appendix A.1).
"""

# M vectors of all images, V codes in the codebook, C width of a code.

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

_KMEANS_ROUNDS = 10  # k-means rounds on the first batch (BEiT v2)
_CHUNK_ROWS = 16384  # vectors compared with the codebook at a time: 0.5 GiB of similarities to 8192 codes


class Quantizer(nn.Module):
    """Replaces each vector by the nearest of V unit-length codes.

    In training mode the first call initialises the codebook with k-means on its batch, and each call moves every code
    towards the mean of the vectors that chose it. In evaluation mode the codebook is fixed. It is a buffer, so no
    gradient or optimizer changes it.

    Args:
        codebook_size: number of codes V.
        codebook_dim: width C of a code.
        ema_decay: share of the old code that an update keeps.
    """

    weight: Tensor
    cluster_size: Tensor
    started: Tensor

    def __init__(self, codebook_size: int, codebook_dim: int, ema_decay: float) -> None:
        super().__init__()
        self.ema_decay = ema_decay
        self.register_buffer("weight", torch.zeros(codebook_size, codebook_dim))
        self.register_buffer("cluster_size", torch.zeros(codebook_size))
        self.register_buffer("started", torch.tensor(False))

    def nearest(self, vectors: Tensor) -> Tensor:
        """Returns the code of each vector.

        Args:
            vectors: (..., C) float32 of length 1.

        Returns:
            (...) int64 in [0, V).
        """
        return _nearest(vectors.flatten(0, -2), self.weight).view(vectors.shape[:-1])

    def forward(self, vectors: Tensor, group: dist.ProcessGroup | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Quantizes vectors; in training mode it also updates the codebook.

        In training mode with a group it all-gathers the vectors in the first call, and all-reduces V * (C + 1) sums
        and counts in every call.

        Args:
            vectors: (..., C) float32 of length 1; the same number on every rank.
            group: ranks that hold parts of one batch; None is this process alone.

        Returns:
            The codes' vectors (..., C), whose gradient passes unchanged to `vectors`; the commitment loss, a scalar,
            the mean squared distance of `vectors` from their codes, which are held fixed; the codes (...) int64.
        """
        if self.training and not self.started:
            self.start(vectors.detach().flatten(0, -2)[None], group)
        codes = self.nearest(vectors.detach())
        quantized = F.embedding(codes, self.weight)
        commitment = F.mse_loss(vectors, quantized)
        if self.training:
            self.update(vectors.detach().flatten(0, -2), codes.flatten(), group)
        return vectors + (quantized - vectors).detach(), commitment, codes

    @torch.no_grad()
    def start(self, vectors: Tensor, group: dist.ProcessGroup | None = None) -> None:
        """Sets the codebook to the centres of a cosine k-means over the vectors of all ranks; every rank gets the same
        centres.

        All-gathers the vectors, from which each rank computes the centres.

        Args:
            vectors: (batches, rows, C) float32 of length 1; the same number on every rank. The rows of each batch are
                joined in rank order, so the codebook does not depend on the number of ranks.
            group: ranks that hold parts of the batches; None is this process alone.
        """
        vectors_MC = torch.cat([_gather(rows, group) for rows in vectors])
        centers_VC = _draw_centers(vectors_MC, self.weight.shape[0])
        for _ in range(_KMEANS_ROUNDS):
            codes_M = _nearest(vectors_MC, centers_VC)
            centers_VC, counts_V = _mean_directions(vectors_MC, codes_M, centers_VC, None)
        self.weight.copy_(centers_VC)
        self.cluster_size.copy_(counts_V)
        self.started.fill_(True)

    @torch.no_grad()
    def update(self, vectors_MC: Tensor, codes_M: Tensor, group: dist.ProcessGroup | None = None) -> None:
        """Moves each code towards the mean direction of its vectors and normalises it to length 1.

        A code that no vector chose on any rank keeps its value.
        """
        means_VC, counts_V = _mean_directions(vectors_MC, codes_M, self.weight, group)
        moved_VC = F.normalize(self.weight.lerp(means_VC, 1 - self.ema_decay), dim=-1)
        # An unused code keeps its value bit for bit; rounding would let it drift.
        self.weight.copy_(torch.where(counts_V[:, None] > 0, moved_VC, self.weight))
        self.cluster_size.lerp_(counts_V, 1 - self.ema_decay)


def _nearest(vectors_MC: Tensor, codebook_VC: Tensor) -> Tensor:
    # The nearest unit vector has the largest inner product. Never in bfloat16: near ties decide the code.
    with torch.autocast(vectors_MC.device.type, enabled=False):
        return torch.cat([(rows @ codebook_VC.T).argmax(-1) for rows in vectors_MC.split(_CHUNK_ROWS)])


def _mean_directions(
    vectors_MC: Tensor, codes_M: Tensor, fallback_VC: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Returns each code's normalised mean over all ranks, (V, C), `fallback_VC` where it has no vector; counts (V,)."""
    ones_M1 = vectors_MC.new_ones(len(vectors_MC), 1)
    totals = vectors_MC.new_zeros(fallback_VC.shape[0], fallback_VC.shape[1] + 1)
    totals.index_add_(0, codes_M, torch.cat([vectors_MC, ones_M1], dim=1))
    if group is not None:
        dist.all_reduce(totals, group=group)  # sums and counts in one message
    sums_VC, counts_V = totals[:, :-1], totals[:, -1]
    means_VC = torch.where(counts_V[:, None] > 0, F.normalize(sums_VC, dim=-1), fallback_VC)
    return means_VC, counts_V


def _draw_centers(vectors_MC: Tensor, num_centers: int) -> Tensor:
    """Draws the first centres by k-means++ (Arthur and Vassilvitskii, 2007).

    A vector's chance to become the next centre is its distance from the nearest centre so far. Uniform draws would
    spend most centres on white backgrounds, which are all the same vector.
    """
    generator = torch.Generator().manual_seed(0)  # every rank draws the same centres from the gathered vectors
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


def _gather(vectors_MC: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Returns the vectors of all ranks in rank order."""
    if group is None:
        return vectors_MC
    parts = [torch.empty_like(vectors_MC) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, vectors_MC.contiguous(), group=group)
    return torch.cat(parts)
