"""Computes the recall of retrieval from the rank of the right candidate of each query.

The rank is the number of wrong candidates that score at least as high as the right candidate. Ties count against the
right candidate. A model that gives all candidates the same score therefore retrieves nothing. Scores that differ by at
most `TIE` are ties, because rounding makes features of equal inputs differ between batches. If a query has several
right candidates, only the best of them is ranked.
"""

# Q queries, N candidates, D features, B rows of a block.

from collections.abc import Sequence

import torch
from torch import Tensor

LEVELS = (1, 5, 10)
"""Values of K for recall at K."""
TIE = 1e-6
"""Maximum difference of two scores that count as equal."""
_BLOCK_ELEMENTS = 1 << 24


def match_ranks(
    query_QD: Tensor, candidate_ND: Tensor, matches: Sequence[Sequence[int]], rank: int = 0, num_ranks: int = 1
) -> Tensor:
    """Returns the rank of each query's right candidate, (queries,) int64 on the CPU.

    The rank of a candidate is the number of wrong candidates that score higher or tie with it (`TIE`). If a query has
    several right candidates, the one with the highest score counts.

    Scores are computed in float32, in blocks of queries with at most 2^24 scores per block. Several processes may share
    the blocks; the elementwise maximum of their results is the complete result. The blocks, and therefore the rounding
    of scores, do not depend on the number of processes.

    Args:
        query_QD: features of all queries, (queries, features), normalised to length 1.
        candidate_ND: features of all candidates, (candidates, features), normalised to length 1.
        matches: indices of the right candidates of each query, at least one per query.
        rank: index of this process among the processes that share the work.
        num_ranks: number of processes; the result is -1 for queries of other processes.
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
    # `not <` counts NaN scores as higher, so a broken model is never right.
    is_ahead_BN = ~(score_BN < (best_B - TIE)[:, None])
    is_ahead_BN[rows, columns] = False
    return is_ahead_BN.sum(1)


def recall(ranks: Tensor, name: str) -> dict[str, float]:
    """Returns the share of queries whose right candidate is among the best 1, 5 and 10, as `NAME@1`, `NAME@5` and
    `NAME@10`.

    Args:
        ranks: rank of the right candidate of each query, from 0 (`match_ranks`).
        name: first part of the result's keys.
    """
    return {f"{name}@{level}": int((ranks < level).sum()) / max(1, len(ranks)) for level in LEVELS}
