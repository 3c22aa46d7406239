"""Prepares items ahead in worker processes; replaces workers that die or stop, and limits every wait."""

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

TaskT = TypeVar("TaskT")
ItemT = TypeVar("ItemT")

_MAX_REPLACEMENTS = 3
"""Workers that may die or stop over one item. One may be an accident, such as the kernel's memory killer; more in a row
are the fault of a record or of the machine."""
_STOPPED_SECONDS = 10.0
"""Time that a worker may be stopped while its item is waited for; debuggers stop processes for less."""


class WorkerLossError(ConfigError):
    """Workers died or stopped repeatedly over one item; the message names the item and the last loss."""


@dataclass(frozen=True, kw_only=True)
class Preparation(Generic[TaskT, ItemT]):
    """The work of a pool's workers."""

    work: Callable[[TaskT, Callable[[str], None]], ItemT]
    """Prepares the item of a task, the same in every call, and reports what it reads to its second argument. It is
    pickled once per worker."""
    describe: Callable[[TaskT], str]
    """Names a task's item, for messages, such as "step 17"."""
    limits: WaitLimits
    """Limits of each wait for an item."""
    set_up: Callable[[], object] | None = None
    """Called once in each worker process, before its first task."""
    preload: str = "torch"
    """Module that workers need, imported once for all of them."""


def prepare_in_order(
    preparation: Preparation[TaskT, ItemT], tasks: Iterable[TaskT], num_workers: int, ahead: int
) -> Iterator[ItemT]:
    """Yields the items of tasks in their order.

    Args:
        preparation: the work.
        tasks: tasks, which are read only as workers get them.
        num_workers: processes, of which each prepares every num_workers-th item; 0 uses a thread of this process.
        ahead: most items that each worker prepares ahead.

    Raises:
        StopRequestedError: if this process was asked to stop while an item was waited for.
        DataTimeoutError: if an item did not come in time.
        WorkerLossError: if workers die or stop repeatedly over one item.
    """
    if num_workers == 0:
        yield from _prepare_here(preparation, tasks)
        return
    crew = _Crew(preparation)
    try:
        rest = iter(tasks)
        pending: deque[tuple[int, TaskT]] = deque()
        for number, task in enumerate(rest):
            pending.append((number % num_workers, task))
            if number < num_workers:
                crew.hire()
            crew.ask(number % num_workers, task)
            if len(pending) == num_workers * ahead:
                break
        while pending:
            worker, task = pending.popleft()
            item = crew.receive(worker, task)
            for next_task in rest:
                pending.append((worker, next_task))
                crew.ask(worker, next_task)
                break
            yield item
    finally:
        crew.dismiss()


def prepare_in_any_order(
    preparation: Preparation[TaskT, ItemT], tasks: Iterable[TaskT], num_workers: int
) -> Iterator[ItemT]:
    """Yields the items of tasks as they are finished, by `num_workers` processes, at least one.

    An item may take any time as long as its worker computes; the wait ends once a worker has used no processor time for
    `limits.seconds`.

    Raises:
        StopRequestedError, DataTimeoutError, WorkerLossError: as `prepare_in_order` does.
    """
    crew = _Crew(preparation)
    try:
        rest = iter(tasks)
        busy: dict[int, tuple[TaskT, WaitTimer, int]] = {}
        error: Exception | None = None
        for worker, task in zip(range(num_workers), rest, strict=False):
            crew.hire()
            busy[worker] = crew.begin(worker, task)
        while busy:
            crew.wait(list(busy))
            for worker, (task, patience, ticks) in list(busy.items()):
                if (now := crew.workers[worker].cpu_ticks()) != ticks:
                    patience.restart()
                    busy[worker] = (task, patience, now)
                reply = crew.look(worker, task, patience, seconds=0)
                if reply is None:
                    continue
                del busy[worker]
                try:
                    item = crew.take(worker, task, reply)
                except Exception as raised:  # items that other workers have begun are finished and kept
                    error = error or raised
                    continue
                for next_task in rest if error is None else ():
                    busy[worker] = crew.begin(worker, next_task)
                    break
                yield item
        if error is not None:
            raise error
    finally:
        crew.dismiss()


class _Crew(Generic[TaskT, ItemT]):
    """The workers of one pool, with the tasks of each."""

    def __init__(self, preparation: Preparation[TaskT, ItemT]) -> None:
        self._preparation, self._limits = preparation, preparation.limits
        self.workers: list[WorkerProcess] = []
        self._asked: list[deque[TaskT]] = []
        self._replaced: list[int] = []
        self._stopped: list[float] = []
        """Seconds for which each worker has been seen stopped."""
        self._looked: list[float] = []
        self._told_slow = False

    def hire(self) -> None:
        """Starts one more worker."""
        self.workers.append(self._start())
        self._asked.append(deque())
        self._replaced.append(0)
        self._stopped.append(0.0)
        self._looked.append(time.monotonic())

    def ask(self, worker: int, task: TaskT) -> None:
        """Gives a worker one more task."""
        self._asked[worker].append(task)
        self.workers[worker].ask(task)

    def begin(self, worker: int, task: TaskT) -> tuple[TaskT, WaitTimer, int]:
        """Gives an idle worker a task."""
        self.ask(worker, task)
        return task, WaitTimer(self._limits), self.workers[worker].cpu_ticks()

    def receive(self, worker: int, task: TaskT) -> ItemT:
        """Waits for the item of a worker's oldest task."""
        patience = WaitTimer(self._limits)
        while (reply := self.look(worker, task, patience, POLL_SECONDS)) is None:
            pass
        return self.take(worker, task, reply)

    def wait(self, workers: list[int]) -> None:
        """Waits briefly until one of some workers has sent something."""
        poll = select.poll()
        for worker in workers:
            poll.register(self.workers[worker], select.POLLIN)
        poll.poll(POLL_SECONDS * 1000)

    def look(self, worker: int, task: TaskT, patience: WaitTimer, seconds: float) -> Reply | None:
        """Returns the reply of a worker if it arrives within some seconds; replaces the worker if it is lost."""
        process = self.workers[worker]
        was_ready = process.is_ready
        try:
            reply = process.receive(seconds)
        except WorkerDiedError as death:
            self._replace(worker, task, str(death))
            return None
        if reply is None:
            # Time in which a scheduler had suspended this process too does not count.
            now = time.monotonic()
            passed = min(now - self._looked[worker], 2 * POLL_SECONDS)
            self._looked[worker] = now
            self._stopped[worker] = self._stopped[worker] + passed if process.is_stopped() else 0.0
            if self._stopped[worker] >= min(_STOPPED_SECONDS, self._limits.seconds / 2):
                self._replace(worker, task, f"stopped for {self._stopped[worker]:.0f} s ({process.describe()})")
            if process.is_ready and not was_ready:
                patience.restart()
            patience.check(lambda: self._describe(worker, task), is_start=not process.is_ready)
        return reply

    def take(self, worker: int, task: TaskT, reply: Reply) -> ItemT:
        """Returns the item of a reply, or raises what the work raised."""
        asked = self._asked[worker].popleft()
        assert asked is task, "replies come in the order of tasks"
        self._replaced[worker], self._stopped[worker] = 0, 0.0
        if reply.error is not None:
            raise reply.error from (None if isinstance(reply.error, ConfigError) else RuntimeError(f"\n{reply.trace}"))
        if (slow := self.workers[worker].inline_bytes) and not self._told_slow:
            self._told_slow = True
            self._tell(
                f"{slow / 1e6:.1f} MB of {self._preparation.describe(task)} found no room in {SHARED_MEMORY} "
                f"({_free_bytes(SHARED_MEMORY) / 1e6:.1f} MB are free) and came through a socket, which is slower. "
                f"Make {SHARED_MEMORY} larger (docker run --shm-size), or lower data.num_workers or data.prefetch_steps"
            )
        item: ItemT = reply.item
        return item

    def dismiss(self) -> None:
        """Ends all workers."""
        for process in self.workers:
            process.kill()

    def _start(self) -> WorkerProcess:
        process = WorkerProcess(self._preparation.work, self._preparation.set_up, self._preparation.preload)
        process.start(self._limits)
        return process

    def _replace(self, worker: int, task: TaskT, why: str) -> None:
        """Replaces a lost worker by a new one with the same tasks, which gives the same items."""
        self.workers[worker].kill()
        self._replaced[worker] += 1
        what = f"data worker {worker}, which prepares {self._preparation.describe(task)}: {why}"
        if self._replaced[worker] > _MAX_REPLACEMENTS:
            raise WorkerLossError(
                f"{self._limits.where} has lost {self._replaced[worker]} workers over the same item. The last one was "
                f"{what}. Look at what it read and at the memory of the machine, or set data.num_workers to 0."
            )
        self._tell(f"lost {what}. Another one starts ({self._replaced[worker]} of {_MAX_REPLACEMENTS} for this item)")
        self._stopped[worker] = 0.0
        self.workers[worker] = self._start()
        for asked in self._asked[worker]:
            self.workers[worker].ask(asked)

    def _describe(self, worker: int, task: TaskT) -> str:
        return f"{self._preparation.describe(task)} from data worker {worker} ({self.workers[worker].describe()})"

    def _tell(self, line: str) -> None:
        print(f"WARNING: {self._limits.where}: {line}", file=sys.stderr, flush=True)


def _prepare_here(preparation: Preparation[TaskT, ItemT], tasks: Iterable[TaskT]) -> Iterator[ItemT]:
    """Prepares items one by one in a thread, so that a hanging file system does not block the main thread."""
    thread, place = ReaderThread("reading data"), CurrentRecord()
    place.close_descriptor()
    try:
        for task in tasks:
            work = functools.partial(preparation.work, task, place.note)
            yield thread.call(work, preparation.limits, functools.partial(_describe_reading, preparation, task, place))
    finally:
        thread.close()


def _describe_reading(preparation: Preparation[TaskT, ItemT], task: TaskT, place: CurrentRecord) -> str:
    return f"{preparation.describe(task)}, reading {place.read() or 'its files'}"


def _free_bytes(folder: str) -> int:
    try:
        found = os.statvfs(folder)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize
