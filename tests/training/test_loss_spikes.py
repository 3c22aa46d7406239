"""Tests which losses count as spikes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_ds.training.loss_spikes import LossSpikes, format_spike


def falling(num_steps: int, seed: int, noise: float) -> list[tuple[int, float]]:
    draws = np.random.default_rng(seed).normal(0, noise, num_steps)
    return [(step + 1, 4 + 6 * float(np.exp(-step / 400)) + float(draws[step])) for step in range(num_steps)]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.0, 0.2), st.integers(20, 190))
def test_one_spike_in_a_noisy_curve(seed: int, noise: float, place: int) -> None:
    """Catches a result that depends on the report interval, and a spike that is missed in a falling or noisy curve."""
    losses = falling(200, seed, noise)
    for step in (place, place + 3):
        losses[step] = (losses[step][0], losses[step][1] + 6)
    spikes, found = LossSpikes(), []
    for start in range(0, len(losses), 7):
        found += spikes.find(losses[start : start + 7])
    # Noise of up to 0.2 sometimes exceeds six spreads, because the spread of 20 values is inexact.
    assert {place + 1, place + 4} <= {record["step"] for record in found} and spikes.total == len(found) <= 6
    record = next(record for record in found if record["step"] == place + 1)
    assert record["loss"] == losses[place][1] and record["kind"] == "loss_spike"
    assert record["median"] == pytest.approx(np.median([loss for _, loss in losses[max(0, place - 100) : place]]))
    assert f"loss spike at step {place + 1}: " in format_spike(record)


def test_equal_losses_make_no_small_step_a_spike() -> None:
    spikes = LossSpikes()
    assert spikes.find([(step, 5.0) for step in range(1, 50)] + [(50, 5.05)]) == []
    assert [record["step"] for record in spikes.find([(51, 5.2), (52, 1.0)])] == [51], "a low loss is no spike"


def test_the_first_steps_are_none() -> None:
    """Catches spikes reported among the first steps, which have too few earlier losses to compare with."""
    assert LossSpikes().find([(step, 10.0 * step) for step in range(1, 20)]) == []
