"""Tests the order of samples: each once per epoch, however steps divide the stream."""

import numpy as np

from beit3_ds.data.order.stream import order_from_start, samples_at


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
