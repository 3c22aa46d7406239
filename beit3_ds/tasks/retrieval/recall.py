"""Computes recall of retrieval from the ranks of the right candidates.

The rank of a right candidate is the number of wrong candidates that score at least as high. A tie therefore counts
against the right candidate: a model that gives all candidates the same score retrieves nothing, and the order of the
candidates has no effect. Scores that differ by at most `TIE` count as equal, because features of equal inputs differ by
rounding between batches. If a query has several right candidates, only the best of them is ranked.
"""

# Q queries, N candidates, D features, B rows of a block.

from collections.abc import Sequence

import torch
from torch import Tensor

LEVELS = (1, 5, 10)
"""Values of K for which recall at K is reported."""
TIE = 1e-6
"""Largest difference of two scores that count as equal, for features of length one."""
_BLOCK_ELEMENTS = 1 << 24


def match_ranks(
    query_QD: Tensor, candidate_ND: Tensor, matches: Sequence[Sequence[int]], rank: int = 0, num_ranks: int = 1
) -> Tensor:
    """Returns the rank of the best match of each query, counted from 0, (queries,) int64 on the CPU.

    Scores are computed in float32 in blocks of queries with at most 2^24 scores each. Several processes may share the
    blocks; the elementwise maximum of their results is the complete result. The blocks, and so the rounding of scores,
    do not depend on the number of processes.

    Args:
        query_QD: features of all queries, of length one, (queries, features).
        candidate_ND: features of all candidates, of length one, (candidates, features).
        matches: for each query, the indices of its right candidates, at least one.
        rank: index of this process among the processes.
        num_ranks: number of processes. The result is -1 for queries that another process ranks.
    """
    assert len(matches) == len(query_QD), f"{len(matches)} lists of matches for {len(query_QD)} queries"
    assert all(matches), "a query without a match has no rank"
    candidate_DN = candidate_ND.float().T
    rows = max(1, _BLOCK_ELEMENTS // max(1, len(candidate_ND)))
    ranks = torch.full((len(query_QD),), -1)
    for start in range(rank * rows, len(query_QD), num_ranks * rows):
        block = slice(start, start + rows)
        ranks[block] = _block_ranks(query_QD[block].float() @ candidate_DN, matches[block]).cpu()
    return ranks


def _block_ranks(score_BN: Tensor, matches: Sequence[Sequence[int]]) -> Tensor:
    pairs = [(row, column) for row, columns in enumerate(matches) for column in columns]
    rows, columns = torch.tensor(pairs, device=score_BN.device).unbind(1)
    best_B = torch.full_like(score_BN[:, 0], -torch.inf).scatter_reduce_(0, rows, score_BN[rows, columns], "amax")
    # The negation counts scores that are no numbers as higher, so a broken model is never right.
    is_ahead_BN = ~(score_BN < (best_B - TIE)[:, None])
    is_ahead_BN[rows, columns] = False
    return is_ahead_BN.sum(1)


def recall(ranks: Tensor, name: str) -> dict[str, float]:
    """Returns the share of queries whose rank is below 1, 5 and 10, as `NAME@1`, `NAME@5` and `NAME@10`."""
    return {f"{name}@{level}": int((ranks < level).sum()) / max(1, len(ranks)) for level in LEVELS}
