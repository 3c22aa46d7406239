"""Tests that stop signals are recorded and do not end the process."""

import ctypes
import os
import signal
import threading
import time

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
    """Catches a stuck run that nobody at the terminal can end."""
    with StopSignals().handling() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signals.received == {signal.SIGINT}


def test_a_signal_is_recorded_while_the_main_thread_is_in_a_library() -> None:
    """Catches signals recorded only by a Python handler, which does not run during a collective."""
    libc, mutex, ready = ctypes.CDLL(None), ctypes.create_string_buffer(64), threading.Event()
    seen: list[bool] = []

    def hold_mutex(signals: StopSignals) -> None:
        libc.pthread_mutex_lock(mutex)
        ready.set()
        os.kill(os.getpid(), signal.SIGUSR1)
        deadline = time.monotonic() + 10
        while not signals.is_any_received() and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.append(signals.is_any_received() and signals.received_at is not None)
        libc.pthread_mutex_unlock(mutex)

    with StopSignals().handling() as signals:
        holder = threading.Thread(target=hold_mutex, args=(signals,))
        holder.start()
        ready.wait()
        libc.pthread_mutex_lock(mutex)  # a signal does not interrupt it
        holder.join()
    assert seen == [True]


def test_ignored_hangups_stay_ignored() -> None:
    """Catches a run under nohup that ends when the terminal is closed."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals().handling() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.is_any_received()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_that_was_blocked_is_received() -> None:
    """Checks signals that a launcher has blocked so that they do not end ranks during the start."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)  # other threads of this process do not block it
    with StopSignals().handling() as signals:
        assert signals.received == {signal.SIGUSR1}
