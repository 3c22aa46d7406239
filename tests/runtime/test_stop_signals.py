"""SIGTERM reaches ranks at different times."""

import signal
from typing import Any
from unittest.mock import Mock

import pytest

from beit3_ds.runtime.stop_signals import SharedStopSignals, StopSignals


@pytest.mark.parametrize("others", [0, 1])
def test_a_rank_that_stops_does_not_die_of_its_own_late_signal(others: int) -> None:
    """Seen under srun: the other host's ranks had got it, all had saved, and this one ended with status 143."""
    mesh: Any = Mock(**{"host.sum": lambda received: received + others})
    before = signal.getsignal(signal.SIGTERM)
    signals = StopSignals()
    try:
        with signals.listening():
            assert SharedStopSignals(signals, mesh).agreed() == bool(others)
        after = signal.getsignal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert after == (signal.SIG_IGN if others else before)
