"""Tests that a start that cannot open its files ends in time, names the file and obeys stop signals."""

import os
import signal
import time
from pathlib import Path

import pytest

from beit3_ds.checkpoint.disk import file_sha256
from beit3_ds.runtime import startup_watchdog as start_watch
from beit3_ds.runtime.startup_watchdog import StartupWatchdog


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    """Whoever opens it for reading waits without end, as for a file system that hangs."""
    path = tmp_path / "texts.txt"
    os.mkfifo(path)
    return path


def hang(pipe: Path, received: set[int], seconds: float) -> list[int]:
    """The statuses with which a watch ends a process whose main thread opens the pipe."""
    statuses = []

    def end(status: int) -> None:
        statuses.append(status)
        os.close(os.open(pipe, os.O_WRONLY))  # releases the main thread of this process

    watch = StartupWatchdog(3, received, seconds, end)
    with pytest.MonkeyPatch.context() as patch:  # else a pipe is refused
        patch.setattr("beit3_ds.checkpoint.disk.open_regular", lambda path: os.open(path, os.O_RDONLY))
        file_sha256(pipe)  # as of a tokenizer
    watch.stop()
    return statuses


def test_files_that_cannot_be_opened_end_the_start(pipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert hang(pipe, set(), 2) == [1]
    error = capfd.readouterr().err
    assert f"error on rank 3: the start has stood still for 2 s (data.timeout_seconds): with {pipe}, at" in error


def test_signal_ends_a_start_that_hangs(
    pipe: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a hanging start that no signal ends, because signals are only recorded until all ranks have met."""
    monkeypatch.setattr(start_watch, "STOP_SECONDS", 1.0)
    assert hang(pipe, {signal.SIGTERM}, 600) == [128 + signal.SIGTERM]
    assert f"SIGTERM came during the start, which has not ended 1 s later: with {pipe}" in capfd.readouterr().err


def test_a_start_that_works_is_let_alone() -> None:
    """Catches a bound on the whole start: texts may take hours to tokenize."""
    statuses: list[int] = []
    watch = StartupWatchdog(0, set(), 1.0, statuses.append)
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        sum(range(1000))
    watch.end_opening()
    time.sleep(2.5)  # for other ranks, whose waits have bounds of their own
    watch.stop()
    assert statuses == []
