"""Assigns the positions of an endless order to weighted sources."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_SHARE_PARTS = 10**6


def assign_sources(
    weights: Sequence[float], positions: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Divides an endless order between sources, as evenly as their weights allow.

    Of n positions source 0 takes floor(n * its share), source 1 its share of the rest, and so on. Position p belongs to
    the source whose count grows from p to p + 1 positions. So every source visits its own places 0, 1, 2, ... without a
    gap, and its count differs from its share of the first n positions by less than the number of sources. Shares are
    rounded to a millionth, so that integers keep this exact up to 9e12 positions.

    Args:
        weights: weight of each source, above 0.
        positions: (n,) int64.

    Returns:
        The source of each position and its place in the order of that source, (n,) int64 each.
    """
    parts = mixture_shares(weights)
    sources, places = np.empty_like(positions), np.empty_like(positions)
    left = positions  # positions so far that the sources before this one did not take
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
    """Counts the positions that each source has in `assign_sources`, of the first `positions` ones."""
    parts, left, taken = mixture_shares(weights), positions, []
    for source, part in enumerate(parts):
        taken.append(left * part // sum(parts[source:]))
        left -= taken[-1]
    return taken


def mixture_shares(weights: Sequence[float]) -> list[int]:
    """Returns the sources' shares in millionths, at least one each; equal shares mean equal turns."""
    return [max(1, round(weight / sum(weights) * _SHARE_PARTS)) for weight in weights]
