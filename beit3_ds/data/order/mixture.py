"""Mixes the weighted sources of a stream: decides which source the stream's n-th sample comes from."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_SHARE_PARTS = 10**6


def assign_sources(
    weights: Sequence[float], positions: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Assigns each position of a stream to one source, in proportion to the weights and evenly spread.

    A position is the index of a sample, counted from 0 among all samples that a run takes from the stream. For every n,
    the rule fixes how many of the first n positions each source gets. The share of a source is its weight divided by
    the sum of all weights. Source 0 gets floor(n * share). A later source gets floor(r * share / s). Here, r is n minus
    the number of positions of all earlier sources, and s is the sum of the shares of this source and all later sources.
    A source's number of positions differs from n * share by less than the number of sources. Shares are rounded to a
    millionth, so int64 products are exact up to 9e12 positions.

    Args:
        weights: weight of each source, above 0.
        positions: positions in the stream, (n,) int64.

    Returns:
        Index of each position's source, (n,) int64, and the number of earlier positions with the same source, (n,)
        int64.
    """
    parts = mixture_shares(weights)
    sources, places = np.empty_like(positions), np.empty_like(positions)
    left = positions  # number of earlier positions that earlier sources do not take
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
    """Returns how many of the stream's first `positions` positions `assign_sources` assigns to each source."""
    parts, left, taken = mixture_shares(weights), positions, []
    for source, part in enumerate(parts):
        taken.append(left * part // sum(parts[source:]))
        left -= taken[-1]
    return taken


def mixture_shares(weights: Sequence[float]) -> list[int]:
    """Returns the share of each source in millionths, at least 1; only these shares affect `assign_sources`."""
    return [max(1, round(weight / sum(weights) * _SHARE_PARTS)) for weight in weights]
