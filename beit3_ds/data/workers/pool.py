"""Runs a pool of worker processes that prepare items in advance.

Workers that die or stay suspended are replaced. Every wait has a time limit.
"""

import functools
import os
import select
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from beit3_ds.config import ConfigError
from beit3_ds.data.workers.current_record import CurrentRecord
from beit3_ds.data.workers.process import Reply, WorkerDiedError, WorkerProcess
from beit3_ds.data.workers.transport import SHARED_MEMORY
from beit3_ds.data.workers.waiting import POLL_SECONDS, ReaderThread, WaitLimits, WaitTimer

RequestT = TypeVar("RequestT")
ItemT = TypeVar("ItemT")

_MAX_REPLACEMENTS = 3
"""Maximum number of times that a worker is replaced for one item. If more replacements are needed, the machine or the
item's data is probably bad."""
_STOPPED_SECONDS = 10.0
"""A worker is replaced if it is suspended for this number of seconds while its item is needed. Shorter stops, for
example by a debugger, have no effect."""


class WorkerLossError(ConfigError):
    """Reports that several workers died or stayed suspended during one item; the message names the item."""


@dataclass(frozen=True, kw_only=True)
class Preparation(Generic[RequestT, ItemT]):
    """Defines the work of a worker pool, and the time limits."""

    work: Callable[[RequestT, Callable[[str], None]], ItemT]
    """Function that prepares the item of a request. It is pickled once per worker.

    The arguments are the request, and a function that must be called with the name of each record that is read.
    Repeated calls with one request must return equal items.
    """
    describe: Callable[[RequestT], str]
    """Function that returns the name of a request's item for messages, for example "step 17"."""
    limits: WaitLimits
    """Limits of each wait for an item."""
    set_up: Callable[[], object] | None = None
    """Function that each worker process calls once before its first request."""
    preload: str = "torch"
    """Module that the server process imports once, before it forks the workers."""


def prepare_in_order(
    preparation: Preparation[RequestT, ItemT], requests: Iterable[RequestT], num_workers: int, ahead: int
) -> Iterator[ItemT]:
    """Prepares items in worker processes; yields the items in the order of the requests.

    Args:
        preparation: the work to do, and time limits for the workers.
        requests: requests for items. The next request is read only when a worker can receive it.
        num_workers: number of processes. Each process prepares every num_workers-th item. 0 uses a thread of this
            process.
        ahead: maximum number of items that each worker prepares in advance.

    Raises:
        StopRequestedError: if this process is asked to stop while it waits for an item.
        DataTimeoutError: if an item is not ready within the time limit.
        WorkerLossError: if several workers die or stay suspended during one item.
    """
    if num_workers == 0:
        yield from _prepare_here(preparation, requests)
        return
    workers = _Workers(preparation)
    try:
        remaining = iter(requests)
        pending: deque[tuple[int, RequestT]] = deque()
        for number, request in enumerate(remaining):
            pending.append((number % num_workers, request))
            if number < num_workers:
                workers.add()
            workers.submit(number % num_workers, request)
            if len(pending) == num_workers * ahead:
                break
        while pending:
            worker, request = pending.popleft()
            item = workers.receive(worker, request)
            for next_request in remaining:
                pending.append((worker, next_request))
                workers.submit(worker, next_request)
                break
            yield item
    finally:
        workers.close()


def prepare_in_any_order(
    preparation: Preparation[RequestT, ItemT], requests: Iterable[RequestT], num_workers: int
) -> Iterator[ItemT]:
    """Prepares items in worker processes; yields each item as soon as it is finished.

    A worker must finish an item within the time limit `preparation.limits.seconds`. The limit starts anew whenever the
    worker uses CPU time.

    Args:
        preparation: the work to do, and time limits for the workers.
        requests: requests for items. The next request is read only when a worker is free.
        num_workers: number of processes, at least 1.

    Raises:
        StopRequestedError: if this process is asked to stop while it waits for an item.
        DataTimeoutError: if a worker uses no CPU time for the whole time limit.
        WorkerLossError: if several workers die or stay suspended during one item.
    """
    workers = _Workers(preparation)
    try:
        remaining = iter(requests)
        busy: dict[int, tuple[RequestT, WaitTimer, int]] = {}
        error: Exception | None = None
        for worker, request in zip(range(num_workers), remaining, strict=False):
            workers.add()
            busy[worker] = workers.begin(worker, request)
        while busy:
            workers.wait_for_any(list(busy))
            for worker, (request, timer, ticks) in list(busy.items()):
                if (now := workers.processes[worker].cpu_ticks()) != ticks:
                    timer.restart()
                    busy[worker] = (request, timer, now)
                reply = workers.poll(worker, request, timer, seconds=0)
                if reply is None:
                    continue
                del busy[worker]
                try:
                    item = workers.unpack(worker, request, reply)
                except Exception as raised:  # items that other workers have begun are finished and kept
                    error = error or raised
                    continue
                for next_request in remaining if error is None else ():
                    busy[worker] = workers.begin(worker, next_request)
                    break
                yield item
        if error is not None:
            raise error
    finally:
        workers.close()


class _Workers(Generic[RequestT, ItemT]):
    """Manages the worker processes of one pool, and the unanswered requests of each worker."""

    def __init__(self, preparation: Preparation[RequestT, ItemT]) -> None:
        self._preparation, self._limits = preparation, preparation.limits
        self.processes: list[WorkerProcess] = []
        self._pending: list[deque[RequestT]] = []
        self._num_replaced: list[int] = []
        """For each worker, how often its process has been replaced while the current item was prepared."""
        self._stopped: list[float] = []
        """Seconds for which each worker's process has been suspended."""
        self._polled: list[float] = []
        """Time of the last poll of each worker, in seconds of `time.monotonic`."""
        self._has_warned = False

    def add(self) -> None:
        """Starts an additional worker process."""
        self.processes.append(self._start())
        self._pending.append(deque())
        self._num_replaced.append(0)
        self._stopped.append(0.0)
        self._polled.append(time.monotonic())

    def submit(self, worker: int, request: RequestT) -> None:
        """Sends a request to a worker; the worker answers requests in order."""
        self._pending[worker].append(request)
        self.processes[worker].send(request)

    def begin(self, worker: int, request: RequestT) -> tuple[RequestT, WaitTimer, int]:
        """Sends a request to an idle worker.

        Returns the request, a new timer, and the worker's CPU time in clock ticks.
        """
        self.submit(worker, request)
        return request, WaitTimer(self._limits), self.processes[worker].cpu_ticks()

    def receive(self, worker: int, request: RequestT) -> ItemT:
        """Waits until a worker has answered `request`, and returns the item. `request` must be the worker's oldest
        unanswered request.
        """
        timer = WaitTimer(self._limits)
        while (reply := self.poll(worker, request, timer, POLL_SECONDS)) is None:
            pass
        return self.unpack(worker, request, reply)

    def wait_for_any(self, workers: list[int]) -> None:
        """Waits until one of the given workers has sent data, but not longer than `POLL_SECONDS`."""
        poll = select.poll()
        for worker in workers:
            poll.register(self.processes[worker], select.POLLIN)
        poll.poll(POLL_SECONDS * 1000)

    def poll(self, worker: int, request: RequestT, timer: WaitTimer, seconds: float) -> Reply | None:
        """Waits up to `seconds` for a worker's reply, and returns the reply, or None if none has come.

        If the worker is dead, or has been suspended for too long, this method replaces the worker and returns None.
        """
        process = self.processes[worker]
        was_ready = process.is_ready
        try:
            reply = process.receive(seconds)
        except WorkerDiedError as death:
            self._replace(worker, request, str(death))
            return None
        if reply is None:
            # Does not count time during which this process was suspended too.
            now = time.monotonic()
            passed = min(now - self._polled[worker], 2 * POLL_SECONDS)
            self._polled[worker] = now
            self._stopped[worker] = self._stopped[worker] + passed if process.is_stopped() else 0.0
            if self._stopped[worker] >= min(_STOPPED_SECONDS, self._limits.seconds / 2):
                self._replace(worker, request, f"stopped for {self._stopped[worker]:.0f} s ({process.describe()})")
            if process.is_ready and not was_ready:
                timer.restart()
            timer.check(lambda: self._describe(worker, request), is_start=not process.is_ready)
        return reply

    def unpack(self, worker: int, request: RequestT, reply: Reply) -> ItemT:
        """Returns the item in a worker's reply, or raises the exception in the reply."""
        answered = self._pending[worker].popleft()
        assert answered is request, "replies come in the order of requests"
        self._num_replaced[worker], self._stopped[worker] = 0, 0.0
        if reply.error is not None:
            raise reply.error from (None if isinstance(reply.error, ConfigError) else RuntimeError(f"\n{reply.trace}"))
        if (num_bytes := self.processes[worker].inline_bytes) and not self._has_warned:
            self._has_warned = True
            self._warn(
                f"{num_bytes / 1e6:.1f} MB of {self._preparation.describe(request)} found no room in {SHARED_MEMORY} "
                f"({_free_bytes(SHARED_MEMORY) / 1e6:.1f} MB are free) and came through a socket, which is slower. "
                f"Make {SHARED_MEMORY} larger (docker run --shm-size), or lower data.num_workers or data.prefetch_steps"
            )
        item: ItemT = reply.item
        return item

    def close(self) -> None:
        """Kills all worker processes."""
        for process in self.processes:
            process.kill()

    def _start(self) -> WorkerProcess:
        process = WorkerProcess(self._preparation.work, self._preparation.set_up, self._preparation.preload)
        process.start(self._limits)
        return process

    def _replace(self, worker: int, request: RequestT, why: str) -> None:
        """Replaces a dead or suspended worker by a new process. Sends the worker's unanswered requests to the new
        process.
        """
        self.processes[worker].kill()
        self._num_replaced[worker] += 1
        what = f"data worker {worker}, which prepares {self._preparation.describe(request)}: {why}"
        if self._num_replaced[worker] > _MAX_REPLACEMENTS:
            raise WorkerLossError(
                f"{self._limits.where} has lost {self._num_replaced[worker]} workers over the same item. The last one "
                f"was {what}. Look at what it read and at the memory of the machine, or set data.num_workers to 0."
            )
        self._warn(
            f"lost {what}. Another one starts ({self._num_replaced[worker]} of {_MAX_REPLACEMENTS} for this item)"
        )
        self._stopped[worker] = 0.0
        self.processes[worker] = self._start()
        for pending in self._pending[worker]:
            self.processes[worker].send(pending)

    def _describe(self, worker: int, request: RequestT) -> str:
        return f"{self._preparation.describe(request)} from data worker {worker} ({self.processes[worker].describe()})"

    def _warn(self, line: str) -> None:
        print(f"WARNING: {self._limits.where}: {line}", file=sys.stderr, flush=True)


def _prepare_here(preparation: Preparation[RequestT, ItemT], requests: Iterable[RequestT]) -> Iterator[ItemT]:
    """Prepares items one by one in a thread of this process; a hanging file system blocks only that thread."""
    thread, current = ReaderThread("reading data"), CurrentRecord()
    current.close_descriptor()
    try:
        for request in requests:
            work = functools.partial(preparation.work, request, current.set)
            what = functools.partial(_describe_reading, preparation, request, current)
            yield thread.call(work, preparation.limits, what)
    finally:
        thread.close()


def _describe_reading(preparation: Preparation[RequestT, ItemT], request: RequestT, current: CurrentRecord) -> str:
    return f"{preparation.describe(request)}, reading {current.get() or 'its files'}"


def _free_bytes(folder: str) -> int:
    try:
        found = os.statvfs(folder)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize
