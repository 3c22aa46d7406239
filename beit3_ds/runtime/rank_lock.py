"""Locks the folder that the ranks of a run write to, so that other runs cannot use it."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from beit3_ds.runtime.command_signals import StoppedBySignal
from beit3_ds.runtime.launch_environment import read_launch
from beit3_ds.runtime.stop_signals import StopSignals
from beit3_ds.writer_lock import WaitStoppedError, WriterLock


@contextmanager
def locked_by_rank_0(path: Path, target: str, way_out: str, signals: StopSignals) -> Iterator[Callable[[], float]]:
    """Holds a `WriterLock` on rank 0 during the block. If rank 0 cannot get the lock, the launcher ends all ranks.

    Yields:
        On rank 0, a function that returns the monotonic time when another process was last seen waiting for the lock;
        -inf if never. On other ranks, a function that always returns -inf.

    Args:
        path: file of the lock.
        target: what the lock protects, for messages.
        way_out: what a user can do if the lock is refused, for messages.
        signals: recorder of the stop signals that this process receives. A stop signal ends a wait for the lock.

    Raises:
        ConfigError: on rank 0, if a living process of another run holds the lock, or the lock file cannot be used.
        StorageError: on rank 0, if the lock is still held after `WAIT_SECONDS` by a holder that is stopping or shows no
            sign of life.
        StoppedBySignal: on rank 0, if a stop signal arrives while this process waits for the lock.
    """
    if read_launch(os.environ).rank != 0:
        yield lambda: -math.inf
        return
    with ExitStack() as stack:
        try:
            lock = stack.enter_context(WriterLock(path, target, way_out, is_stopping=signals.is_any_received))
        except WaitStoppedError:
            raise StoppedBySignal(min(signals.received)) from None
        yield lock.contended_at
