"""Tests a worker process: its replies, errors, state and end."""

import os
import time
from collections.abc import Callable, Iterator

import pytest

from beit3_ds.data.workers.process import Reply, WorkerDiedError, WorkerProcess, describe_state, read_stat
from beit3_ds.data.workers.waiting import WaitLimits


def work(request: str, note: Callable[[str], None]) -> str:
    """Answers a request, raises an error or ends the process, depending on the request."""
    note(f"record of {request}")
    if request == "fail":
        raise ValueError("a broken request")
    if request == "exit":
        os._exit(7)
    return request.upper()


@pytest.fixture
def worker() -> Iterator[WorkerProcess]:
    """Starts a worker, and kills it after the test."""
    process = WorkerProcess(work)
    process.start(WaitLimits(seconds=120))
    yield process
    process.kill()


def _receive(worker: WorkerProcess) -> Reply:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if reply := worker.receive(1):
            return reply
    raise AssertionError("no reply")


def test_a_worker_replies_in_order_until_it_ends(worker: WorkerProcess) -> None:
    for request in ("a", "fail", "b", "exit"):
        worker.send(request)
    assert _receive(worker).item == "A"
    assert worker.is_ready
    failed = _receive(worker)
    assert isinstance(failed.error, ValueError)  # catches an error that ends the worker
    assert "in work" in failed.trace
    assert _receive(worker).item == "B"
    with pytest.raises(WorkerDiedError, match=r"ended with status 7, reading record of exit"):
        _receive(worker)
    worker.send("after the end")  # catches a broken pipe that ends the rank
    assert describe_state(worker.pid) == "gone"
    assert read_stat(worker.pid) == []
