"""Tests that all ranks stop after the same step although signals reach them at different times."""

import os
import signal
import time
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from beit3_ds.config import ParallelConfig
from beit3_ds.runtime.distributed_stop_signals import DistributedStopSignals
from beit3_ds.runtime.stop_signals import STOP_SIGNALS, StopSignals
from beit3_ds.storage_error import StorageError
from tests.ranks import run_ranks


@pytest.mark.parametrize("others", [0, 1])
def test_a_rank_that_stops_does_not_die_of_its_own_late_signal(others: int) -> None:
    """Catches a rank that ends with status 143 after all ranks have saved, as seen under srun."""
    mesh: Any = Mock(**{"host.sum": lambda received: received + others})
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    signals = StopSignals()
    try:
        with signals.handling():
            assert DistributedStopSignals(signals, mesh).synchronize() == bool(others)
        after = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert after == (dict.fromkeys(STOP_SIGNALS, signal.SIG_IGN) if others else before)


@pytest.mark.parametrize(
    ("others", "names", "fault"),
    [
        ([0, 0, 0, 0, 0, 0], "", None),
        ([2, 0, 1, 0, 0, 0], "SIGTERM and SIGUSR1", None),
        ([0, 0, 0, 1, 1, 0], "SIGHUP", "data"),
        ([0, 0, 0, 0, 2, 1], "", "storage"),
    ],
)
def test_what_any_rank_met_counts_for_all(others: list[int], names: str, fault: str | None) -> None:
    mesh: Any = Mock(**{"host.sum": lambda own: own + torch.tensor(others)})
    stop = DistributedStopSignals(StopSignals(), mesh)
    assert stop.synchronize() == stop.must_stop == any(others)
    assert (stop.names, stop.data_fault) == (names, fault)


def test_an_own_data_error_is_told_apart_from_a_failing_file_system() -> None:
    mesh: Any = Mock(**{"host.sum": lambda own: own})
    stop = DistributedStopSignals(StopSignals(), mesh)
    assert stop.synchronize(ValueError("no workers")) and stop.data_fault == "data"
    assert stop.synchronize(StorageError("EIO")) and stop.data_fault == "storage"
    assert not stop.synchronize() and not stop.must_stop  # nothing is left of the last agreement


def receive() -> set[int]:
    """Waits for a stop signal on one rank; only rank 1 sends a signal, to itself."""
    from beit3_ds.runtime.process_group import joined_ranks

    with StopSignals().handling() as signals, joined_ranks(ParallelConfig(), None, signals) as mesh:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGUSR1)
        deadline = time.monotonic() + 30
        while not signals.is_any_received() and time.monotonic() < deadline:
            time.sleep(0.05)
        mesh.barrier()  # a rank that leaves is no longer watched
        return set(signals.received)


def test_a_signal_to_one_rank_reaches_all() -> None:
    """Catches ranks that wait for data for minutes while the rank with the signal waits for them."""
    assert run_ranks(receive, 2) == [{signal.SIGUSR1}] * 2
