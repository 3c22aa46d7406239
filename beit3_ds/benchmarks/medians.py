"""Computes medians of repeated measurements, with 95% confidence intervals."""

import math
import statistics
from collections.abc import Sequence


def median_with_interval(values: Sequence[float]) -> dict[str, float]:
    """Returns the median of some values ("median"), and a 95% confidence interval of the median ("low", "high").

    The interval extends from the k-th smallest to the k-th largest value. k is the largest number that gives at least
    95% confidence. Fewer than six values cannot give 95% confidence; the interval then extends from the smallest to the
    largest value.
    """
    ordered, n = sorted(values), len(values)
    # The k-th smallest of n values exceeds the true median with the probability of fewer than k heads in n coin tosses.
    tail = [sum(math.comb(n, j) for j in range(k)) / 2**n for k in range(1, n // 2 + 1)]
    k = max((k for k, chance in enumerate(tail, start=1) if chance <= 0.025), default=1)
    return {"median": statistics.median(ordered), "low": ordered[k - 1], "high": ordered[n - k]}
