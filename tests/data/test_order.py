"""Order of samples: every one once an epoch, however the steps cut it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_ds.data.order import KeyedPermutation, samples_at


@settings(max_examples=150, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**32))
def test_permutation_is_a_bijection(size: int, seed: int) -> None:
    samples = KeyedPermutation(size, np.random.default_rng(seed))(np.arange(size))
    # catches walking that stops outside, and halves of different width mixed up
    assert np.array_equal(np.sort(samples), np.arange(size))


@pytest.mark.parametrize("size", [2**20, 2**20 + 1, 36_000_000])
def test_large_permutation_stays_inside_and_never_repeats(size: int) -> None:
    positions = np.concatenate([np.arange(50_000), np.arange(size - 50_000, size)])
    samples = KeyedPermutation(size, np.random.default_rng(0))(positions)
    assert samples.min() >= 0
    assert samples.max() < size
    assert len(np.unique(samples)) == len(positions)
    assert abs(np.corrcoef(positions, samples)[0, 1]) < 0.02  # catches a network that leaves the order almost as it is


def test_every_sample_comes_first_equally_often() -> None:
    size, rng = 5, np.random.default_rng(0)
    first = [int(KeyedPermutation(size, rng)(np.array([0]))[0]) for _ in range(2000)]
    # catches too few rounds on a tiny domain; 400 expected, deviation 18
    assert min(np.bincount(first, minlength=size)) > 310


def test_no_sample_is_repeated_or_skipped_across_step_borders() -> None:
    size, step_size, steps = 23, 7, 23 * 3
    per_step = [samples_at(1, "images", np.arange(s * step_size, (s + 1) * step_size), size) for s in range(steps)]
    epochs = np.concatenate([epochs for epochs, _ in per_step])
    samples = np.concatenate([samples for _, samples in per_step])
    assert set(epochs) == set(range(step_size * steps // size))
    for epoch in set(epochs):
        # catches a permutation keyed by the step, and one of the epoch in which the step began
        assert np.array_equal(np.sort(samples[epochs == epoch]), np.arange(size))


def test_epochs_streams_and_seeds_differ() -> None:
    size = 50
    orders = [
        samples_at(1, "images", np.arange(size), size)[1],
        samples_at(1, "images", np.arange(size) + size, size)[1],  # catches one shuffle for all epochs
        samples_at(1, "pairs", np.arange(size), size)[1],
        samples_at(2, "images", np.arange(size), size)[1],
    ]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_a_position_does_not_depend_on_its_neighbours() -> None:
    together = samples_at(1, "texts", np.arange(30), 8)[1]
    alone = [int(samples_at(1, "texts", np.array([p]), 8)[1][0]) for p in range(30)]
    assert together.tolist() == alone
