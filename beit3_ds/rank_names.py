"""Formats lists of ranks for messages."""

from collections.abc import Iterable


def join_ranks(ranks: Iterable[int]) -> str:
    """Formats ranks in ascending order, such as "rank 3" or "ranks 0-2, 5"."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    names = ", ".join(f"{first}-{last}" if first < last else f"{first}" for first, last in spans)
    return f"{'rank' if len(spans) == 1 and spans[0][0] == spans[0][1] else 'ranks'} {names}"
