"""Ends a run on all ranks when one of them fails or no longer answers, and says which."""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from beit3_ds.config import ParallelConfig

_POLL_SECONDS = 1.0
_GRACE_SECONDS = 5.0
"""How long ranks have to answer a roll call, and to end by themselves after an error that all of them meet."""


class RollCall:
    """A thread on every rank that answers when another rank calls the roll.

    A rank that meets an error, or whose collective fails, announces it in the rendezvous store. All ranks' threads then
    answer, whatever their main threads wait for; the rank that does not answer is the one that died or was stopped.
    Every rank prints one line that names it and ends with status 1. Nothing is sent while all is well: each thread asks
    the store once a second.
    """

    def __init__(self, parallel: ParallelConfig, end: Callable[[int], None] = os._exit) -> None:
        """Connects to the store that MASTER_ADDR and MASTER_PORT name; the process group must exist.

        Args:
            parallel: to say where on the mesh a rank stands.
            end: what ends this process: its main thread may wait in a collective for ever.
        """
        self._parallel, self._end = parallel, end
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=_GRACE_SECONDS),
        )
        self._store.set(f"roll_call/host/{self._rank}", socket.gethostname())
        dist.barrier()  # so that every host is known by the time one is missed
        self._hosts = [self._store.get(f"roll_call/host/{rank}").decode() for rank in range(self._size)]
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="roll call", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; this rank answers no more."""
        self._stopped.set()
        self._thread.join()

    def announce(self, failure: str | None) -> None:
        """Calls the roll, and waits until all ranks have answered, five seconds at most.

        Args:
            failure: what went wrong on this rank, one line; None if it only lost contact with another.
        """
        try:
            if failure is not None:
                self._store.set(f"roll_call/failed/{self._rank}", failure.splitlines()[0])
            self._store.set("roll_call/called", "yes")
            self._wait_for_answers()
        except (RuntimeError, dist.DistError):
            return  # the store is gone: the other threads see that too

    def wait_for_the_end(self) -> None:
        """Waits until this rank's thread ends the process."""
        self._thread.join()

    def describe(self, rank: int) -> str:
        """Names a rank, its place on the mesh and its host."""
        place = self._parallel.place(rank, self._size)
        return f"rank {rank} ({place}, host {self._hosts[rank]})"

    def _watch(self) -> None:
        while not self._stopped.wait(_POLL_SECONDS):
            try:
                if not self._store.check(["roll_call/called"]):
                    continue
                failure = self._first_failure()  # before answering: who failed leaves once all have answered
                self._store.set(f"roll_call/present/{self._rank}", "yes")
                missing = self._wait_for_answers()
            except (RuntimeError, dist.DistError):
                failure, missing = f"{self.describe(0)} does not answer: it holds the store where ranks meet", []
            if self._stopped.wait(_GRACE_SECONDS):  # this rank ended by itself meanwhile
                return
            verdict = failure or self._name_missing(missing)
            print(f"error on {self.describe(self._rank)}: {verdict}. The run ends.", file=sys.stderr, flush=True)
            self._end(1)
            return

    def _first_failure(self) -> str | None:
        for rank in range(self._size):
            key = f"roll_call/failed/{rank}"
            if self._store.check([key]):
                return f"{self.describe(rank)} failed: {self._store.get(key).decode()}"
        return None

    def _wait_for_answers(self) -> list[int]:
        """Returns the ranks that have not answered in time."""
        deadline = time.monotonic() + _GRACE_SECONDS
        missing = list(range(self._size))
        while missing and time.monotonic() < deadline:
            missing = [rank for rank in missing if not self._store.check([f"roll_call/present/{rank}"])]
            time.sleep(_POLL_SECONDS / 10)
        return missing

    def _name_missing(self, missing: list[int]) -> str:
        if missing:
            return f"{', '.join(self.describe(rank) for rank in missing)} does not answer"
        seconds = self._parallel.timeout_seconds
        return f"ranks lost contact or waited longer than parallel.timeout_seconds={seconds}, though all still answer"
