"""Ends a run on all ranks when one of them fails, stalls or no longer answers, and says which."""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch.distributed as dist

from beit3_ds.config import ParallelConfig
from beit3_ds.parallel.mesh import Mesh
from beit3_ds.runtime.failure_detector import FailureDetector, Verdict
from beit3_ds.runtime.heartbeat import Heartbeat, RankStatuses, find_sleep

_POLL_SECONDS = 1.0
_GRACE_SECONDS = 5.0
"""How long ranks have to beat when they are called, and to end by themselves after an error that all of them meet."""
_BEATS_PER_TIMEOUT = 6
_NOTHING = "nothing"
_STORE_ERRORS = (RuntimeError, dist.DistError)


class Watchdog:
    """Two threads on every rank: one talks to the other ranks through the rendezvous store, one watches that it can.

    Every rank beats: it writes what its main thread is doing, `Heartbeat`, under a key of its own. Rank 0 reads all
    beats and judges; the others read the verdict and rank 0's beat, so that they find out if it is the one that is
    gone. There are four verdicts, each naming rank, place and host:

    * a rank failed: it said so in the store before it ended;
    * it does not answer: no beat for `heartbeat_timeout_seconds`, or for five seconds once a collective has failed;
    * it stalls: it beats, but for `timeout_seconds` its main thread neither got on nor waited, while others waited.
      Then all ranks write the stacks of their threads to stderr. Before that it is *slow*, which is only reported;
    * the store does not answer: rank 0, or its host, or the link to it. The second thread finds that, for an operation
      of the first may wait for ever.

    Then every rank prints one line and ends with status 1.

    Messages: each rank asks the store once a second for three short values, and writes one of about 80 bytes every
    sixth of `heartbeat_timeout_seconds`; rank 0 also reads all beats once a second, in one request. With 512 ranks and
    60 s that is 565 requests and less than 200 kB a second; a store answers 24,000 a second on one core.
    """

    def __init__(self, parallel: ParallelConfig, mesh: Mesh, end: Callable[[int], None] = os._exit) -> None:
        """Connects to the store that MASTER_ADDR and MASTER_PORT name; the process group must exist. All ranks call it.

        Args:
            parallel: the time-outs.
            mesh: names the ranks, and knows what this one's main thread does.
            end: what ends this process: its main thread may wait in a collective for ever.
        """
        self._parallel, self._activity, self._end = parallel, mesh.activity, end
        self._describe = mesh.describe
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._beat_seconds = parallel.heartbeat_timeout_seconds / _BEATS_PER_TIMEOUT
        self._poll_seconds = min(_POLL_SECONDS, self._beat_seconds)
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=_GRACE_SECONDS),
        )
        # torchrun's agents keep one store for all restarts.
        self._store = dist.PrefixStore(f"watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        self._lost_contact = ""
        self._count, self._beaten_at, self._state = 0, 0.0, "running"
        self._beat()
        if self._rank == 0:
            for key in ("failed", "called", "verdict"):
                self._store.set(key, _NOTHING)
        mesh.host.barrier()  # so that all ranks have written their keys
        watched = range(self._size) if self._rank == 0 else [0]
        self._standings = RankStatuses(self._read_beats(watched), self._poll_seconds)
        self._judgement = FailureDetector(parallel, self._standings, self._describe)
        self._stopped, self._ended = threading.Event(), threading.Event()
        self._talked, self._obeys = time.monotonic(), False
        self._thread = threading.Thread(target=self._talk, name="roll call", daemon=True)
        self._guard = threading.Thread(target=self._watch_store, name="roll call's guard", daemon=True)
        self._thread.start()
        self._guard.start()

    def stop(self) -> None:
        """Ends the threads; this rank needs no watching any more."""
        self._stopped.set()
        self._thread.join()
        self._state = "left"
        with contextlib.suppress(*_STORE_ERRORS):  # it is gone, and with it whoever would have read it
            self._beat()
        self._ended.set()
        self._guard.join()

    def announce_failure(self, error: Exception) -> None:
        """Tells all ranks that this one has failed, and waits until they know, ten seconds at most."""
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        self._announce(f"{self._describe(self._rank)} failed: {line}")

    def announce_lost_contact(self, error: Exception) -> None:
        """Asks why a collective failed, and waits until this rank's threads end the process."""
        self._activity.lost_contact = True
        self._lost_contact = "".join(traceback.format_exception(error))
        self._announce(None)
        self._thread.join()
        self._guard.join()

    def _announce(self, failure: str | None) -> None:
        try:
            if failure is not None:
                self._store.compare_set("failed", _NOTHING, failure)  # the first one counts
            self._store.compare_set("called", _NOTHING, "yes")
            self._wait_until(lambda: self._store.get("verdict").decode() != _NOTHING)
            if self._rank == 0:  # its process may hold the store
                self._wait_until(self._all_know)
        except _STORE_ERRORS:
            return  # it is gone: the other ranks see that too

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

    def _talk(self) -> None:
        """The first thread."""
        try:
            while not self._stopped.wait(self._poll_seconds):
                called, verdict, first_beat = (
                    value.decode() for value in self._store.multi_get(["called", "verdict", "beat/0"])
                )
                if verdict != _NOTHING:
                    self._obey(Verdict(*json.loads(verdict)))
                    return
                if called != _NOTHING or time.monotonic() - self._beaten_at >= self._beat_seconds:
                    self._beat()
                if self._rank == 0:
                    self._judge(called != _NOTHING)
                else:
                    self._standings.update([Heartbeat.decode(first_beat)])
                    if self._standings.find_lost(self._parallel.heartbeat_timeout_seconds):
                        self._pronounce(Verdict(f"{self._describe(0)} does not answer"))
                self._talked = time.monotonic()
        except _STORE_ERRORS:
            self._obey(Verdict(f"{self._describe(0)} does not answer: it holds the store where ranks meet"))

    def _watch_store(self) -> None:
        """The second thread, which does nothing that could wait."""
        last = time.monotonic()
        while not self._ended.wait(_POLL_SECONDS):
            now = time.monotonic()
            if find_sleep(now - last, _POLL_SECONDS):
                self._talked = now
            last = now
            silence = now - self._talked
            is_needed = self._thread.is_alive() and not self._obeys
            if is_needed and silence > self._parallel.heartbeat_timeout_seconds:
                self._dump_stacks()
                self._finish(
                    f"{self._describe(0)} does not answer: it holds the store where ranks meet, which this rank has "
                    f"not reached for {silence:.0f} s. It was stopped, or its host or the link to it is down"
                )
                return

    def _judge(self, is_called: bool) -> None:
        """On rank 0: looks at all ranks, says which are slow, and pronounces a verdict if there is one."""
        failed, *beats = (value.decode() for value in self._store.multi_get(["failed", *_beat_keys(range(self._size))]))
        self._standings.update([Heartbeat.decode(beat) for beat in beats])
        verdict = self._judgement.find_verdict(None if failed == _NOTHING else failed, is_called)
        if verdict is not None:
            self._pronounce(verdict)
        for line in self._judgement.describe_slow():
            print(line, flush=True)

    def _pronounce(self, verdict: Verdict) -> None:
        self._store.compare_set("verdict", _NOTHING, json.dumps(verdict))  # the first counts

    def _obey(self, verdict: Verdict) -> None:
        """Ends the process, unless it ends by itself in the time that the other ranks need to read the verdict."""
        self._state = "ending"
        with contextlib.suppress(*_STORE_ERRORS):  # who held the store may be gone
            self._beat()
        self._obeys = True
        if verdict.dump:
            self._dump_stacks()
        if not self._stopped.wait(_GRACE_SECONDS):
            self._finish(verdict.text)

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
        if self._lost_contact:
            print(f"where its collective failed:\n{self._lost_contact}", file=sys.stderr, flush=True)

    def _all_know(self) -> bool:
        return all(beat.state != "running" for beat in self._read_beats(range(self._size)))

    def _wait_until(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _GRACE_SECONDS
        while not happened() and time.monotonic() < deadline:
            time.sleep(self._poll_seconds / 10)


def _beat_keys(ranks: Sequence[int]) -> list[str]:
    return [f"beat/{rank}" for rank in ranks]
