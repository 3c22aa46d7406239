"""Stop signals are recorded instead of ending the process."""

import os
import signal
import threading

import pytest

from beit3_ds.runtime.stop_signals import STOP_SIGNALS, StopSignals


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_recorded_and_its_handler_restored(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignals().handling() as signals:
        assert not signals.is_any_received()
        os.kill(os.getpid(), number)
        assert signals.is_any_received() and signals.received == {number}
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_interrupts() -> None:
    """Catches a run that nobody at the terminal can end while it is stuck."""
    with StopSignals().handling() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signals.received == {signal.SIGINT}


def test_a_signal_that_was_blocked_is_received() -> None:
    """`beit3 launch` starts ranks with stop signals blocked, so that none ends them while they start."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)  # other threads of this process do not block it
    with StopSignals().handling() as signals:
        assert signals.received == {signal.SIGUSR1}
