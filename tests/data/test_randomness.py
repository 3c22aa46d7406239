"""Tests that random generators depend only on their arguments."""

from typing import Any

import numpy as np

from beit3_ds.data.randomness import sample_rng


def test_draws_are_fixed_for_ever() -> None:
    # catches Python's salted hash(), and a change that would move every run's data
    assert sample_rng(1, "patch mask", "images", 0, 7).integers(0, 1000, 4).tolist() == [348, 229, 906, 645]


def test_every_argument_counts() -> None:
    calls: list[tuple[Any, ...]] = [
        (1, "a", "b"),
        (2, "a", "b"),
        (1, "ab"),  # catches words joined without a border
        (1, "a,'b'"),
        (1, "a", "b", 0),
        (1, "a", "b", 1),
        (1, "a", "b", "1"),  # catches a number that counts as its print
    ]
    draws = {int(sample_rng(*call).integers(2**63)) for call in calls}
    assert len(draws) == len(calls)


def test_numpy_integers_count_as_plain_ones() -> None:
    # catches repr(np.int64(3)) in the key: indices come from arrays as well as from ranges
    assert sample_rng(1, "a", np.int64(3)).integers(2**63) == sample_rng(np.int64(1), "a", 3).integers(2**63)
