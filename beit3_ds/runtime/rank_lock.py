"""Keeps other runs out of the folder that the ranks of a run write."""

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
    """Holds a `WriterLock` on rank 0 during the block; the launcher ends the other ranks if rank 0 does not get it.

    Yields a function: on rank 0 it returns the monotonic time at which another process last asked for the lock, or
    -inf.

    Args:
        path: the lock's file.
        target: what the lock protects, for messages.
        way_out: what a refused user can do.
        signals: signals that this process receives; one of them ends a wait for the lock.

    Raises:
        ConfigError: on rank 0, if another run uses the folder.
        StorageError: on rank 0, if another run that is ending or hangs does not release the folder in time.
        StoppedBySignal: on rank 0, if a stop signal ends the wait for a run that is ending.
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
