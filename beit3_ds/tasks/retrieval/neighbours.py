"""Finds the candidates with the highest scores for each query."""

# Q queries, N candidates, D features.

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 24


def best_candidates(query_QD: Tensor, candidate_ND: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns the candidates with the highest scores for each query, best first, and their scores.

    Scores are computed in float32, in blocks of queries with at most 2^24 scores per block.

    Args:
        query_QD: features of all queries, (queries, features), normalised to length 1.
        candidate_ND: features of all candidates, (candidates, features), normalised to length 1.
        count: number of candidates per query; all candidates if there are fewer.

    Returns:
        Indices of the candidates, (queries, count) int64, and their scores, (queries, count) float32, on the CPU.
    """
    candidate_DN = candidate_ND.float().t()
    kept = min(count, len(candidate_ND))
    rows = max(1, _BLOCK_ELEMENTS // max(1, len(candidate_ND)))
    found = [(block.float() @ candidate_DN).topk(kept, dim=1) for block in query_QD.split(rows)]
    if not found:
        return torch.empty(0, kept, dtype=torch.int64), torch.empty(0, kept)
    return torch.cat([best.indices for best in found]).cpu(), torch.cat([best.values for best in found]).cpu()
