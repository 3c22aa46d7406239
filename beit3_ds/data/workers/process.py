"""Runs one worker process, which prepares items; every wait for the worker has a time limit."""

import contextlib
import multiprocessing
import os
import pickle
import select
import signal
import socket
import threading
import traceback
import weakref
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

from beit3_ds.data.workers.current_record import CurrentRecord
from beit3_ds.data.workers.fork_server import start_fork_server
from beit3_ds.data.workers.transport import ItemReceiver, send_item
from beit3_ds.data.workers.waiting import ReaderThread, WaitLimits

Request = Any
Work = Callable[[Request, Callable[[str], None]], Any]
"""Function that prepares the item of a request.

The arguments are the request, and a function that must be called with the name of each record that is read.
"""

_EXIT_SECONDS = 2.0
_READY = "ready"


class WorkerDiedError(Exception):
    """Reports that a worker process ended; the message gives the exit status or signal."""


class Reply(NamedTuple):
    """Holds a worker's answer to a request: either an item or an exception."""

    item: Any
    error: BaseException | None
    """Exception raised during the preparation; None if the request succeeded."""
    trace: str
    """Traceback of the exception; empty if the request succeeded."""


class WorkerProcess:
    """Controls one worker process, and the socket to that process.

    The worker blocks stop signals. It exits when this process exits. When the worker dies, the socket closes. Only
    `start`, `receive` and `kill` wait for the worker, each with a time limit.
    """

    def __init__(self, work: Work, set_up: Callable[[], object] | None = None, preload: str = "torch") -> None:
        """Stores the arguments; `start` starts the process.

        Args:
            work: function that prepares the item of a request; must be picklable.
            set_up: function that the worker process calls once before its first request.
            preload: module that the fork server imports once for all workers.
        """
        self._work, self._set_up, self._preload = work, set_up, preload
        self._process: BaseProcess | None = None
        self.is_ready = False
        """Whether the worker has finished its imports."""

    def start(self, limits: WaitLimits) -> None:
        """Starts the worker process and sends it the pickled work function.

        Raises:
            DataTimeoutError: if the fork server does not answer within the time limit.
            StopRequestedError: if the calling process is asked to stop.
        """
        start_fork_server(self._preload)
        own, other = socket.socketpair()
        context = multiprocessing.get_context("forkserver")
        self._process = context.Process(target=_serve, args=(other, self._work, self._set_up), daemon=True)
        thread = ReaderThread("starting a data worker")
        try:
            what = "the server that forks data workers, which does not answer"
            thread.call(self._process.start, limits, lambda: what, is_start=True)
        finally:
            other.close()
            thread.close()
        self._connection, self._receiver = own, ItemReceiver(own)
        self._current = CurrentRecord()
        socket.send_fds(own, [b"p"], [self._current.descriptor])
        self._current.close_descriptor()
        handle = os.pidfd_open(self.pid)  # a pid may be reused by another process, this handle is not
        self._kill = weakref.finalize(self, _kill, handle)  # also at exit, which would wait for a stopped worker

    @property
    def pid(self) -> int:
        """Returns the process id of the started worker."""
        assert self._process is not None and self._process.pid is not None, "not started"
        return self._process.pid

    def send(self, request: Request) -> None:
        """Sends a request; does nothing if the worker is dead. The worker answers requests in order."""
        try:
            send_item(self._connection, request)
        except (BrokenPipeError, ConnectionResetError):
            return  # `receive` raises

    def receive(self, seconds: float) -> Reply | None:
        """Waits for the reply to the oldest unanswered request.

        Args:
            seconds: maximum wait in seconds; 0 does not wait.

        Returns:
            The reply, or None if no complete reply has arrived. If the worker's start message or a part of a reply
            arrives, the wait ends at once, and the result is None.

        Raises:
            WorkerDiedError: if the worker ended without a reply.
        """
        try:
            arrived = self._receiver.receive()
            if arrived is None and seconds:
                poll = select.poll()  # select.select fails above 1024 open files
                poll.register(self._connection, select.POLLIN)
                poll.poll(seconds * 1000)
                arrived = self._receiver.receive()
        except EOFError:
            raise WorkerDiedError(self._describe_end()) from None
        if arrived is not None and not self.is_ready:
            self.is_ready, arrived = True, None
        return None if arrived is None else Reply(*arrived[0])

    @property
    def inline_bytes(self) -> int:
        """Returns how many tensor bytes of the last reply went through the socket, because shared memory was full."""
        return self._receiver.inline_bytes

    def fileno(self) -> int:
        """Returns the file descriptor of the socket, so that `select` accepts this object."""
        return self._connection.fileno()

    def describe(self) -> str:
        """Describes the worker for messages: process id, state, and the record that it is reading."""
        reading = self._current.get()
        return f"pid {self.pid}, {describe_state(self.pid)}" + (f", reading {reading}" if reading else "")

    def is_stopped(self) -> bool:
        """Returns whether the worker process is suspended by SIGSTOP or a debugger."""
        return read_stat(self.pid)[:1] in (["T"], ["t"])

    def cpu_ticks(self) -> int:
        """Returns the worker's CPU time in clock ticks; 0 if the process no longer exists."""
        fields = read_stat(self.pid)
        return int(fields[11]) + int(fields[12]) if fields else 0

    def kill(self) -> None:
        """Kills the worker process and waits at most two seconds for its end."""
        if self._process is None or self._process.pid is None:
            return
        self._kill()
        self._process.join(_EXIT_SECONDS)
        self._connection.close()
        self._receiver.close()

    def _describe_end(self) -> str:
        assert self._process is not None
        self._process.join(_EXIT_SECONDS)
        status = self._process.exitcode
        if status is None:
            how = "closed its connection"
        elif status >= 0:
            how = f"ended with status {status}"
        else:
            how = f"died of {signal.Signals(-status).name}"
            if -status == signal.SIGKILL:
                how += " (the kernel sends it when memory is short)"
        reading = self._current.get()
        return f"pid {self.pid} {how}" + (f", reading {reading}" if reading else "")


def describe_state(pid: int) -> str:
    """Describes the state of a process, for example "running" or "blocked in input or output"."""
    words = {
        "R": "running",
        "S": "waiting",
        "D": "blocked in input or output",
        "T": "stopped by a signal",
        "t": "stopped by a debugger",
        "Z": "dead",
    }
    return words.get("".join(read_stat(pid)[:1]), "gone")


def read_stat(pid: int) -> list[str]:
    """Returns the fields of /proc/PID/stat, starting with the process state; empty if the process does not exist."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _kill(handle: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    os.close(handle)


def _serve(connection: socket.socket, work: Work, set_up: Callable[[], object] | None) -> None:
    """Runs in the worker process: answers requests in order until the rank closes the socket."""
    torch.set_num_threads(1)  # more threads would compete with the training process for its cores
    threading.Thread(target=_end_with_rank, daemon=True).start()
    if set_up is not None:
        set_up()
    _, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
    if not descriptors:
        return
    current, receiver = CurrentRecord(descriptors[0]), ItemReceiver(connection)
    try:
        send_item(connection, _READY)
        while True:
            while (arrived := receiver.receive()) is None:
                select.select([connection], [], [])
            send_item(connection, tuple(_do(work, arrived[0], current)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _do(work: Work, request: Request, current: CurrentRecord) -> Reply:
    try:
        return Reply(work(request, current.set), None, "")
    except Exception as error:
        trace = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # some exceptions of libraries cannot be pickled
            error = RuntimeError(f"{type(error).__name__}: {error}")
        return Reply(None, error, trace)


def _end_with_rank() -> None:
    """Ends this worker process as soon as the rank's process has ended in any way, such as SIGKILL."""
    rank = multiprocessing.parent_process()
    assert rank is not None, "only workers have a rank"
    rank.join()
    os._exit(1)
