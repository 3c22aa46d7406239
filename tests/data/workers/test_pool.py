"""Tests that workers that die, stop, hang or run out of memory are named in time, and replaced if possible."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from beit3_ds.data.workers.pool import Preparation, WorkerLossError, prepare_in_any_order, prepare_in_order
from beit3_ds.data.workers.waiting import DataTimeoutError, StopRequestedError, WaitLimits

BOUND_SECONDS = 200  # far beyond every time-out here; a hang would last forever


class Work:
    """Prepares items, with a fault at one request: either once, or at every attempt."""

    def __init__(self, fault: str = "", at: int = -1, once: Path | None = None) -> None:
        self.fault, self.at, self.once = fault, at, once

    def __call__(self, request: int, note: Callable[[str], None]) -> tuple[int, Tensor]:
        note(f"sample-{request}.png")
        if request == self.at and not (self.once and self.once.exists()):
            if self.once:
                self.once.touch()
            if self.fault == "hang":
                time.sleep(1000)
            os.kill(os.getpid(), getattr(signal, self.fault))
        return request, torch.full((1000,), request)


def limits(seconds: float = 60, is_stopping: Callable[[], bool] = lambda: False) -> WaitLimits:
    return WaitLimits(seconds=seconds, is_stopping=is_stopping, where="rank 3 (host h)")


def prepare(work: Work, bounds: WaitLimits, num_workers: int = 2, requests: int = 6) -> list[int]:
    start = time.monotonic()
    try:
        preparation = Preparation(work=work, describe=lambda request: f"step {request + 1}", limits=bounds)
        items = list(prepare_in_order(preparation, range(requests), num_workers, ahead=2))
    finally:
        assert time.monotonic() - start < BOUND_SECONDS
    for number, values in items:
        assert torch.equal(values, torch.full((1000,), number))
    return [number for number, _ in items]


@pytest.mark.parametrize("fault", ["SIGKILL", pytest.param("SIGBUS", marks=pytest.mark.slow), "SIGSTOP"])
def test_lost_worker_is_named_and_replaced(fault: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches an endless wait, and items that are lost, repeated or out of order after a replacement."""
    work = Work(fault, at=3, once=tmp_path / "happened")
    assert prepare(work, limits(seconds=6)) == [0, 1, 2, 3, 4, 5]
    (line,) = (line for line in capfd.readouterr().err.splitlines() if "WARNING" in line)
    assert "rank 3 (host h): lost data worker 1, which prepares step" in line
    assert "reading sample-3.png" in line
    assert ("stopped for" if fault == "SIGSTOP" else f"died of {fault}") in line
    assert "Another one starts (1 of 3" in line


def test_worker_that_dies_again_and_again_ends_the_wait(tmp_path: Path) -> None:
    with pytest.raises(
        WorkerLossError, match=r"has lost 4 workers over the same item.*step 2: pid \d+ died of SIGSEGV"
    ):
        prepare(Work("SIGSEGV", at=1), limits())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_hanging_read_is_named_in_time(num_workers: int) -> None:
    with pytest.raises(DataTimeoutError, match=r"rank 3 \(host h\) has waited 2 s for step 2.*reading sample-1.png"):
        prepare(Work("hang", at=1), limits(seconds=2), num_workers)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_request_to_stop_ends_the_wait(num_workers: int) -> None:
    asked = threading.Event()
    threading.Timer(1, asked.set).start()
    with pytest.raises(StopRequestedError):
        prepare(Work("hang", at=1), limits(is_stopping=asked.is_set), num_workers)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_errors_of_the_work_arrive(num_workers: int) -> None:
    with pytest.raises(ZeroDivisionError):
        list(prepare_in_order(Preparation(work=divide, describe=str, limits=limits()), [1, 0, 2], num_workers, ahead=1))


def divide(request: int, note: Callable[[str], None]) -> float:
    return 1 / request


def test_any_order_replaces_and_names(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    work = Work("SIGKILL", at=2, once=tmp_path / "happened")
    preparation = Preparation(work=work, describe=lambda request: f"tar {request}", limits=limits())
    found = sorted(number for number, _ in prepare_in_any_order(preparation, range(5), 2))
    assert found == [0, 1, 2, 3, 4]
    assert "which prepares tar 2" in capfd.readouterr().err


@pytest.mark.slow
def test_any_order_ends_when_a_worker_does_nothing() -> None:
    preparation = Preparation(
        work=Work("hang", at=1), describe=lambda request: f"tar {request}", limits=limits(seconds=2)
    )
    with pytest.raises(DataTimeoutError, match="tar 1 from data worker"):
        list(prepare_in_any_order(preparation, range(3), 2))


NO_ROOM = """
import resource, sys
from tests.data.workers.test_pool import Work, limits, prepare
if __name__ == "__main__":
    if sys.argv[1] == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # what a full /dev/shm is: no file may grow
    print(prepare(Work(), limits()))
"""


@pytest.mark.parametrize("means", ["limit", pytest.param("mount", marks=pytest.mark.slow)])
def test_no_room_in_shared_memory_is_named_and_survived(means: str, tmp_path: Path) -> None:
    """Checks full shared memory, in which torch's own workers die of SIGBUS."""
    script = tmp_path / "no_room.py"
    script.write_text(NO_ROOM)
    command = f"{sys.executable} {script} {means}"
    if means == "mount":
        command = f"mount -t tmpfs -o size=4k none /dev/shm && {command}"
        if subprocess.run(
            ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/dev/shm"], capture_output=True
        ).returncode:
            pytest.skip("this user may not mount a small /dev/shm")
        command = f"unshare -m sh -c '{command}'"
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120, env=environment)
    assert "[0, 1, 2, 3, 4, 5]" in done.stdout, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if "WARNING" in line)
    assert "found no room in /dev/shm" in line and "docker run --shm-size" in line


LONG_TMPDIR = """
from tests.data.workers.test_pool import Work, limits, prepare
if __name__ == "__main__":
    print(prepare(Work(), limits()))
"""


def test_long_tmpdir_is_no_obstacle(tmp_path: Path) -> None:
    """Checks a TMPDIR longer than 107 bytes, the limit of a socket's address."""
    folder = tmp_path / ("t" * (115 - len(str(tmp_path))))
    folder.mkdir()
    assert len(str(folder)) >= 116
    script = tmp_path / "script.py"
    script.write_text(LONG_TMPDIR)
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "TMPDIR": str(folder)}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, env=environment)
    assert "[0, 1, 2, 3, 4, 5]" in done.stdout, done.stderr
    assert not list(folder.iterdir())
