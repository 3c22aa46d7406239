"""Tests medians and their confidence intervals."""

from beit3_ds.benchmarks.medians import median_with_interval


def test_interval_of_a_median() -> None:
    # With 11 values, the 2nd and the 10th: the chance to miss is 2 * 12 / 2048; the 3rd would miss 6.5% of the time.
    values = [float(v) for v in (7, 3, 11, 1, 9, 5, 2, 10, 4, 8, 6)]
    assert median_with_interval(values) == {"median": 6, "low": 2, "high": 10}
