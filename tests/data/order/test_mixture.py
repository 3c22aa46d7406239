"""Tests that weighted sources share the positions of a stream exactly."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_ds.data.order.mixture import assign_sources, positions_per_source


def test_shares_follow_the_weights_over_any_stretch() -> None:
    weights = (0.3, 0.05, 0.65)
    sources, _ = assign_sources(weights, np.arange(20_000))
    for source, weight in enumerate(weights):
        counts = np.concatenate([[0], np.cumsum(sources == source)])
        for length in (100, 6144, 20_000):
            # catches shares that hold on average only, and rounding that is lost at the border of a block
            stretches = counts[length:] - counts[:-length]
            assert np.abs(stretches - weight * length).max() < 2 * len(weights)


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.floats(0.001, 100), min_size=1, max_size=6), start=st.integers(0, 10**10))
def test_each_source_takes_its_places_in_turn(weights: list[float], start: int) -> None:
    sources, places = assign_sources(weights, np.arange(start, start + 500))
    for source in range(len(weights)):
        own = places[sources == source]
        assert (np.diff(own) == 1).all()  # catches a place that two positions share, and one that none has
    alone = [assign_sources(weights, np.array([start + i])) for i in range(0, 500, 50)]
    assert [int(source[0]) for source, _ in alone] == sources[::50].tolist()
    assert [int(place[0]) for _, place in alone] == places[::50].tolist()


def test_first_places_are_zero() -> None:
    sources, places = assign_sources((1, 2), np.arange(30))
    assert [int(places[sources == source][0]) for source in range(2)] == [0, 0]


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.floats(0.001, 100), min_size=1, max_size=6), count=st.integers(0, 2000))
def test_positions_are_counted(weights: list[float], count: int) -> None:
    sources, _ = assign_sources(weights, np.arange(count))
    assert positions_per_source(weights, count) == np.bincount(sources, minlength=len(weights)).tolist()
