"""Order of samples: every one once an epoch, however the steps cut it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_ds.data.order.mixture import assign_sources, positions_per_source
from beit3_ds.data.order.permutation import KeyedPermutation
from beit3_ds.data.order.stream import order_from_start, samples_at


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
    per_step = [samples_at(1, ("images",), np.arange(s * step_size, (s + 1) * step_size), size) for s in range(steps)]
    epochs = np.concatenate([epochs for epochs, _ in per_step])
    samples = np.concatenate([samples for _, samples in per_step])
    assert set(epochs) == set(range(step_size * steps // size))
    for epoch in set(epochs):
        # catches a permutation keyed by the step, and one of the epoch in which the step began
        assert np.array_equal(np.sort(samples[epochs == epoch]), np.arange(size))


def test_epochs_streams_and_seeds_differ() -> None:
    size = 50
    orders = [
        samples_at(1, ("images",), np.arange(size), size)[1],
        samples_at(1, ("images",), np.arange(size) + size, size)[1],  # catches one shuffle for all epochs
        samples_at(1, ("pairs",), np.arange(size), size)[1],
        samples_at(2, ("images",), np.arange(size), size)[1],
    ]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_a_position_does_not_depend_on_its_neighbours() -> None:
    together = samples_at(1, ("texts",), np.arange(30), 8)[1]
    alone = [int(samples_at(1, ("texts",), np.array([p]), 8)[1][0]) for p in range(30)]
    assert together.tolist() == alone


@pytest.mark.slow
def test_permutation_is_a_bijection_of_the_paper_s_36_million_images() -> None:
    size, chunk = 36_000_000, 1_000_000
    permutation, seen = KeyedPermutation(size, np.random.default_rng(0)), np.zeros(size, dtype=bool)
    for start in range(0, size, chunk):
        samples = permutation(np.arange(start, start + chunk))
        assert not seen[samples].any()
        seen[samples] = True
    assert seen.all()


def test_turns_follow_the_weights_over_any_stretch() -> None:
    weights = (0.3, 0.05, 0.65)
    turns, _ = assign_sources(weights, np.arange(20_000))
    for source, weight in enumerate(weights):
        counts = np.concatenate([[0], np.cumsum(turns == source)])
        for length in (100, 6144, 20_000):
            # catches shares that hold on average only, and rounding that is lost at the border of a block
            stretches = counts[length:] - counts[:-length]
            assert np.abs(stretches - weight * length).max() < 2 * len(weights)


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.floats(0.001, 100), min_size=1, max_size=6), start=st.integers(0, 10**10))
def test_each_source_takes_its_places_in_turn(weights: list[float], start: int) -> None:
    turns, places = assign_sources(weights, np.arange(start, start + 500))
    for source in range(len(weights)):
        own = places[turns == source]
        assert (np.diff(own) == 1).all()  # catches a place that two positions share, and one that none has
    alone = [assign_sources(weights, np.array([start + i])) for i in range(0, 500, 50)]
    assert [int(turn[0]) for turn, _ in alone] == turns[::50].tolist()
    assert [int(place[0]) for _, place in alone] == places[::50].tolist()


def test_first_places_are_zero() -> None:
    turns, places = assign_sources((1, 2), np.arange(30))
    assert [int(places[turns == source][0]) for source in range(2)] == [0, 0]


def test_weighted_sources_have_epochs_of_their_own() -> None:
    order = order_from_start(1, "pairs", (5, 40, 5), (0.25, 0.5, 0.25))
    epochs, samples = order(np.arange(400))
    for low, high, num_epochs in ((0, 5, 20), (5, 45, 5), (45, 50, 20)):
        here = (samples >= low) & (samples < high)
        for epoch in range(num_epochs):
            # catches one epoch count for all sources, and a source that starts again early
            assert sorted(samples[here & (epochs == epoch)]) == list(range(low, high))
        assert (np.diff(epochs[here]) >= 0).all()  # catches an epoch that begins before the last one is through
    first, last = samples[samples < 5], samples[samples >= 45] - 45
    assert first.tolist() != last.tolist()  # catches sources of one size that are shuffled alike


def test_without_weights_the_sources_are_one_set() -> None:
    positions = np.arange(50)
    several = order_from_start(1, "pairs", (5, 8, 7))(positions)
    assert np.array_equal(several, samples_at(1, ("pairs",), positions, 20))


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.floats(0.001, 100), min_size=1, max_size=6), count=st.integers(0, 2000))
def test_turns_are_counted(weights: list[float], count: int) -> None:
    turns, _ = assign_sources(weights, np.arange(count))
    assert positions_per_source(weights, count) == np.bincount(turns, minlength=len(weights)).tolist()
