"""Ends a run on all ranks if one rank fails, stalls or does not answer, and names that rank."""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence

import torch.distributed as dist

from beit3_ds.config import ParallelConfig
from beit3_ds.parallel.mesh import Mesh
from beit3_ds.runtime.failure_detector import Failure, FailureDetector
from beit3_ds.runtime.heartbeat import Heartbeat, RankStatuses, find_sleep
from beit3_ds.runtime.keyed_store import ForgedValueError
from beit3_ds.runtime.stop_signals import StopSignals

_POLL_SECONDS = 1.0
STORE_SECONDS = 5.0
"""Time limit of one request to the store in seconds."""
_GRACE_SECONDS = 5.0
"""After a failure, the watchdog ends a process if the process has not ended by itself within this number of seconds.
Rank 0 has this number of seconds to publish a reported failure. After that, all ranks have this number of seconds to
read the failure."""
_BEATS_PER_TIMEOUT = 6
_NONE = "nothing"
"""Value of a key in the store before any rank sets the key."""
_STORE_ERRORS = (RuntimeError, dist.DistError)


class Watchdog:
    """Watches all ranks. Each rank runs two threads: one exchanges heartbeats, one checks that the store answers.

    Every rank writes the phase of its main thread to the store as a `Heartbeat`. Rank 0 reads all heartbeats and runs
    the `FailureDetector`; the other ranks read the result. These failures end a run:

    * a rank failed: the rank reported its error in the store before it ended;
    * a rank does not answer: the rank sent no heartbeat for `heartbeat_timeout_seconds`. After a failed collective, all
      ranks are asked for an immediate heartbeat, and a rank must send it within five seconds;
    * a rank stalled: for `timeout_seconds` its main thread neither made progress nor waited, while other ranks waited;
    * a collective failed although all ranks answer, usually because it timed out;
    * the store does not answer: rank 0, its host or the network link to it is down.

    After a failure, every rank prints one line with the failure and exits with status 1. The line names the failed
    ranks, if known, with their coordinates and hosts. The heartbeat thread also forwards stop signals: if one rank
    receives a signal, all ranks know it about two seconds later.

    Network traffic: each rank reads four short values from the store every second, all in one request. Each rank also
    writes about 80 bytes every `heartbeat_timeout_seconds` / 6 seconds. With 512 ranks and `heartbeat_timeout_seconds`
    = 60, these are 565 requests per second and less than 200 kB per second. A store answers 24,000 requests per second
    on one core.
    """

    def __init__(
        self,
        parallel: ParallelConfig,
        mesh: Mesh,
        store: dist.Store,
        signals: StopSignals | None = None,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        """Starts this rank's two watchdog threads; all ranks must call this constructor.

        Args:
            parallel: config with the timeouts.
            mesh: mesh of the initialised process group. `mesh.activity` holds the current step and phase of this rank;
                `mesh.describe` names ranks in messages.
            store: separate connection to the store where ranks meet, with a timeout of `STORE_SECONDS`.
            signals: stop signals of this process, which are forwarded to all ranks.
            end: ends this process at once, even if the main thread is blocked in a collective.
        """
        self._signals = StopSignals() if signals is None else signals
        self._parallel, self._activity, self._end = parallel, mesh.activity, end
        self._describe = mesh.describe
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._beat_seconds = parallel.heartbeat_timeout_seconds / _BEATS_PER_TIMEOUT
        self._poll_seconds = min(_POLL_SECONDS, self._beat_seconds)
        self._store = store
        self._contact_error: Exception | None = None
        self._count, self._beaten_at, self._state = 0, 0.0, "running"
        self._beat()
        if self._rank == 0:
            for key in ("reported", "beats_requested", "failure", "stop_signal"):
                self._store.set(key, _NONE)
        mesh.host.barrier()  # so that all ranks have written their keys
        watched = range(self._size) if self._rank == 0 else [0]
        self._statuses = RankStatuses(self._read_beats(watched), self._poll_seconds)
        self._detector = FailureDetector(parallel, self._statuses, self._describe)
        self._stopped, self._ended = threading.Event(), threading.Event()
        self._store_answered_at, self._is_ending = time.monotonic(), False
        self._thread = threading.Thread(target=self._watch_ranks, name="watchdog", daemon=True)
        self._store_thread = threading.Thread(target=self._watch_store, name="watchdog of the store", daemon=True)
        self._thread.start()
        self._store_thread.start()

    def stop(self) -> None:
        """Stops the two threads, and tells the other ranks that this rank has left and need not be watched."""
        self._stopped.set()
        self._thread.join()
        self._state = "left"
        with contextlib.suppress(*_STORE_ERRORS):  # the store is gone together with rank 0, and nobody else reads this
            self._beat()
        self._ended.set()
        self._store_thread.join()

    def announce_failure(self, error: Exception) -> None:
        """Reports this rank's failure to rank 0. Then waits until rank 0 has published a failure to all ranks, but at
        most five seconds.

        On rank 0, this method then waits at most five more seconds until all ranks have read the published failure. If
        another rank has already reported a failure, that failure is published instead of this rank's.
        """
        self._report(f"{self._describe(self._rank)} failed: {_first_line(error)}")

    def announce_lost_contact(self, error: Exception) -> None:
        """Reports to rank 0 that a collective failed on this rank, and waits until the watchdog ends this process.

        Rank 0 finds out why the collective failed, and publishes the failure. One of the two watchdog threads of this
        rank then ends this process.
        """
        self._activity.lost_contact = True
        self._contact_error = error
        self._report(None)
        self._thread.join()
        self._store_thread.join()

    def _report(self, failure: str | None) -> None:
        try:
            if failure is not None:
                self._set_once("reported", failure)
            self._set_once("beats_requested", "yes")
            self._wait_until(lambda: self._store.get("failure").decode() != _NONE)
            if self._rank == 0:  # rank 0's process may hold the store
                self._wait_until(self._have_all_read)
        except _STORE_ERRORS:
            return  # the store is gone, which the other ranks detect too

    def _beat(self) -> None:
        self._count += 1
        self._beaten_at = time.monotonic()
        activity = self._activity
        beat = Heartbeat(
            self._count, activity.changes, activity.step, activity.phase, activity.waits_for_ranks(), self._state
        )
        self._store.set(f"beat/{self._rank}", beat.encode())

    def _read_beats(self, ranks: Sequence[int]) -> list[Heartbeat]:
        return [Heartbeat.decode(text) for text in self._store.multi_get(_beat_keys(ranks))]

    def _watch_ranks(self) -> None:
        """Sends heartbeats, and ends the process when any rank publishes a failure. Runs in the heartbeat thread."""
        try:
            while not self._stopped.wait(self._poll_seconds):
                keys = ["beats_requested", "failure", "beat/0", "stop_signal"]
                requested, failure, first_beat, stop_signal = (value.decode() for value in self._store.multi_get(keys))
                self._share_stop_signal(stop_signal)
                if failure != _NONE:
                    self._end_process(Failure(*json.loads(failure)))
                    return
                if requested != _NONE or time.monotonic() - self._beaten_at >= self._beat_seconds:
                    self._beat()
                if self._rank == 0:
                    self._detect_failure(requested != _NONE)
                else:
                    self._statuses.update([Heartbeat.decode(first_beat)])
                    if self._statuses.find_lost(self._parallel.heartbeat_timeout_seconds):
                        self._publish(Failure(f"{self._describe(0)} does not answer"))
                self._store_answered_at = time.monotonic()
        except ForgedValueError as error:
            self._end_process(Failure(str(error)))
        except _STORE_ERRORS:
            self._end_process(Failure(f"{self._describe(0)} does not answer: it holds the store where ranks meet"))

    def _share_stop_signal(self, shared: str) -> None:
        """Shares a stop signal among all ranks through the store.

        If the store holds a stop signal, this rank records it. Otherwise, this rank writes its own stop signal to the
        store, if it has received one.

        Args:
            shared: content of the store: the number of a stop signal, such as "15", or `_NONE`.
        """
        if shared != _NONE:
            self._signals.record(int(shared))
        elif self._signals.is_any_received():
            self._set_once("stop_signal", str(min(self._signals.received)))

    def _watch_store(self) -> None:
        """Ends the process if the store has not answered the heartbeat thread for `heartbeat_timeout_seconds`.

        Runs in a thread that makes no requests to the store, because a request could block.
        """
        last = time.monotonic()
        while not self._ended.wait(_POLL_SECONDS):
            now = time.monotonic()
            if find_sleep(now - last, _POLL_SECONDS):
                self._store_answered_at = now
            last = now
            silence = now - self._store_answered_at
            is_needed = self._thread.is_alive() and not self._is_ending
            if is_needed and silence > self._parallel.heartbeat_timeout_seconds:
                self._dump_stacks()
                self._finish(
                    f"{self._describe(0)} does not answer: it holds the store where ranks meet, which this rank has "
                    f"not reached for {silence:.0f} s. It was stopped, or its host or the link to it is down"
                )
                return

    def _detect_failure(self, are_beats_requested: bool) -> None:
        """Updates the status of all ranks, prints slow ranks, and publishes any failure. Runs on rank 0.

        Args:
            are_beats_requested: whether a failing rank has asked all ranks for a heartbeat.
        """
        values = self._store.multi_get(["reported", *_beat_keys(range(self._size))])
        reported, *beats = (value.decode() for value in values)
        self._statuses.update([Heartbeat.decode(beat) for beat in beats])
        failure = self._detector.find_failure(None if reported == _NONE else reported, are_beats_requested)
        if failure is not None:
            self._publish(failure)
        for line in self._detector.describe_slow():
            print(line, flush=True)

    def _publish(self, failure: Failure) -> None:
        self._set_once("failure", json.dumps(failure))

    def _set_once(self, key: str, value: str) -> None:
        """Writes a value if the key has no value yet. If two ranks write at once, one of the two values remains."""
        if self._store.get(key).decode() == _NONE:
            self._store.set(key, value)

    def _end_process(self, failure: Failure) -> None:
        """Ends the process after five seconds, unless `stop` is called earlier. Meanwhile, other ranks can read the
        failure.
        """
        self._state = "ending"
        with contextlib.suppress(*_STORE_ERRORS):  # the process that holds the store may be gone
            self._beat()
        self._is_ending = True
        text = failure.text
        if failure.dump_stacks:
            self._dump_stacks()
            if self._contact_error is not None:  # it may name an address that belongs to no rank
                text += f". On this rank a collective failed: {_first_line(self._contact_error)}"
        if not self._stopped.wait(_GRACE_SECONDS):
            self._finish(text)

    def _finish(self, why: str) -> None:
        print(f"error on {self._describe(self._rank)}: {why}. The run ends.", file=sys.stderr, flush=True)
        self._end(1)

    def _dump_stacks(self) -> None:
        activity = self._activity
        print(
            f"stacks of {self._describe(self._rank)}, in step {activity.step}, {activity.phase}:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        if self._contact_error is not None:
            where = "".join(traceback.format_exception(self._contact_error))
            print(f"where its collective failed:\n{where}", file=sys.stderr, flush=True)

    def _have_all_read(self) -> bool:
        return all(beat.state != "running" for beat in self._read_beats(range(self._size)))

    def _wait_until(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _GRACE_SECONDS
        while not happened() and time.monotonic() < deadline:
            time.sleep(self._poll_seconds / 10)


def _beat_keys(ranks: Sequence[int]) -> list[str]:
    return [f"beat/{rank}" for rank in ranks]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
