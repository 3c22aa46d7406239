"""Tests a start that cannot open its files: it ends in time, names the file and obeys stop signals."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from beit3_ds.checkpoint.disk import file_sha256
from beit3_ds.runtime import stop_deadline
from beit3_ds.runtime.startup_watchdog import StartupWatchdog
from beit3_ds.runtime.stop_deadline import StopDeadline
from beit3_ds.runtime.stop_signals import StopSignals


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    """Returns a named pipe; opening it for reading waits forever, as on a file system that hangs."""
    path = tmp_path / "texts.txt"
    os.mkfifo(path)
    return path


def hang(pipe: Path, start: Callable[[Callable[[int], None]], StartupWatchdog | StopDeadline]) -> list[int]:
    """Returns the exit statuses with which a watchdog ends a process whose main thread opens the pipe."""
    statuses = []

    def end(status: int) -> None:
        statuses.append(status)
        os.close(os.open(pipe, os.O_WRONLY))  # releases the main thread of this process

    watch = start(end)
    with pytest.MonkeyPatch.context() as patch:  # else a pipe is refused
        patch.setattr("beit3_ds.checkpoint.disk.open_regular", lambda path: os.open(path, os.O_RDONLY))
        file_sha256(pipe)  # as of a tokenizer
    watch.stop()
    return statuses


def test_files_that_cannot_be_opened_end_the_start(pipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert hang(pipe, lambda end: StartupWatchdog(3, 2, end)) == [1]
    error = capfd.readouterr().err
    assert f"error on rank 3: the start has stood still for 2 s (data.timeout_seconds): with {pipe}, at" in error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_ends_a_start_that_hangs(
    number: signal.Signals, pipe: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a hanging start that no signal ends, because signals are only recorded until all ranks have met."""
    monkeypatch.setattr(stop_deadline, "STOP_SECONDS", 0.5)
    with StopSignals().handling() as signals:
        os.kill(os.getpid(), number)
        assert hang(pipe, lambda end: StopDeadline(3, signals, end)) == [128 + signal.SIGTERM]
    name = "SIGHUP (the terminal is closed)" if number == signal.SIGHUP else number.name
    assert f"error on rank 3: {name} was received, and the start has not ended" in (error := capfd.readouterr().err)
    assert f"later: with {pipe}, at disk.py" in error


def test_a_start_that_works_is_let_alone() -> None:
    """Catches a time limit on the whole start; tokenizing texts may take hours."""
    statuses: list[int] = []
    watch = StartupWatchdog(0, 1.0, statuses.append)
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        sum(range(1000))
    watch.stop()
    assert statuses == []
