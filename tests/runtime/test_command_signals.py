"""Tests that a stop signal ends a command: the command cleans up, or ends by force if it does not respond."""

import atexit
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from beit3_ds.runtime import command_signals
from beit3_ds.runtime.command_signals import StoppedBySignal, end_program, ending_on_signals
from beit3_ds.runtime.stop_signals import STOP_SIGNALS


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_unwinds_the_command(number: signal.Signals) -> None:
    before, cleaned_up = signal.getsignal(number), []

    def command() -> None:
        with ending_on_signals():
            try:
                os.kill(os.getpid(), number)
            finally:
                os.kill(os.getpid(), number)  # a second signal does not interrupt the clean-up
                cleaned_up.append(True)

    with pytest.raises(StoppedBySignal) as stopped:
        command()
    assert cleaned_up and signal.getsignal(number) == before
    assert stopped.value.status == 128 + (signal.SIGTERM if number == signal.SIGHUP else number)
    assert f"stopped by {number.name}" in str(stopped.value)


def test_a_library_that_turns_the_signal_into_its_own_error_is_stopped_too() -> None:
    """Checks an interrupted training of SentencePiece, which raises RuntimeError in place of the interruption."""

    def command() -> None:
        with ending_on_signals():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except KeyboardInterrupt:
                raise RuntimeError("the library's own words") from None

    with pytest.raises(StoppedBySignal, match="stopped by SIGTERM"):
        command()


def test_a_command_in_a_library_ends_by_force(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches a command that no signal ends while a tokenizer trains in C++."""
    monkeypatch.setattr(command_signals, "STOP_SECONDS", 0.2)
    libc, mutex, ready, statuses = ctypes.CDLL(None), ctypes.create_string_buffer(64), threading.Event(), [0]
    ended = threading.Event()

    def end(status: int) -> None:
        statuses[0] = status
        ended.set()

    def hold_mutex() -> None:
        libc.pthread_mutex_lock(mutex)
        ready.set()
        ended.wait(10)
        libc.pthread_mutex_unlock(mutex)

    def command() -> None:
        with ending_on_signals(end):
            holder.start()
            ready.wait()
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
            libc.pthread_mutex_lock(mutex)  # a signal does not interrupt it

    holder = threading.Thread(target=hold_mutex)
    with pytest.raises(StoppedBySignal):
        command()
    holder.join()
    assert statuses == [128 + signal.SIGTERM]
    assert capfd.readouterr().err.startswith("error: stopped by SIGTERM: each file is complete or absent")


def test_other_threads_leave_signals_alone() -> None:
    """Catches signal handlers set up in a thread that is not the main one, where Python forbids them."""
    before, entered = signal.getsignal(signal.SIGTERM), []

    def enter() -> None:
        with ending_on_signals():
            entered.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [before]


def end_slowly() -> None:
    """Ends this process as programs do; the end takes until a signal arrives."""
    atexit.register(lambda: (print("ending", flush=True), time.sleep(60)))
    end_program(0)


def test_an_interrupt_while_python_ends_prints_no_traceback() -> None:
    """Catches "Exception ignored in atexit callback" after a run whose results are complete."""
    command = [sys.executable, "-c", f"from {__name__} import end_slowly; end_slowly()"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ending\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (-signal.SIGINT, "")
