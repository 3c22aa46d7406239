"""Mixes weighted sources: assigns each position of a stream to a source."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_SHARE_PARTS = 10**6


def assign_sources(
    weights: Sequence[float], positions: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Assigns each position of a stream to one of its sources, in proportion to the weights and evenly spread.

    Of the first n positions, source 0 gets floor(n * its share), source 1 gets its share of the rest, rounded down, and
    so on. So each source's number of positions differs from its exact share by less than the number of sources. Shares
    are rounded to a millionth, so int64 products are exact up to 9e12 positions.

    Args:
        weights: weight of each source, above 0.
        positions: positions in the stream, (n,) int64.

    Returns:
        The source of each position, and how many earlier positions of the stream belong to this source; both (n,)
        int64.
    """
    parts = mixture_shares(weights)
    sources, places = np.empty_like(positions), np.empty_like(positions)
    left = positions  # number of earlier positions that no earlier source takes
    unassigned = np.ones(len(positions), dtype=bool)
    for source, part in enumerate(parts):
        remaining = sum(parts[source:])
        taken = left * part // remaining
        here = unassigned & ((left + 1) * part // remaining > taken)
        sources[here], places[here] = source, taken[here]
        unassigned &= ~here
        left = left - taken
    return sources, places


def positions_per_source(weights: Sequence[float], positions: int) -> list[int]:
    """Returns the number of positions that each source gets from `assign_sources` among the first `positions`."""
    parts, left, taken = mixture_shares(weights), positions, []
    for source, part in enumerate(parts):
        taken.append(left * part // sum(parts[source:]))
        left -= taken[-1]
    return taken


def mixture_shares(weights: Sequence[float]) -> list[int]:
    """Returns the share of each source in millionths, at least 1; `assign_sources` uses nothing else of the weights."""
    return [max(1, round(weight / sum(weights) * _SHARE_PARTS)) for weight in weights]
