"""Holds a `WriterLock` until standard input ends or the process is killed; tests run it as a separate process."""

import errno
import fcntl
import os
import select
import sys
import threading
from pathlib import Path

from beit3_ds.writer_lock import WriterLock


def main(path: str, what: str) -> None:
    """Prints "held", and later "contended" if another process asks for the lock.

    Args:
        path: path of the lock file.
        what: additional behaviour that a test needs.
    """
    stopping = threading.Event()
    if what.endswith("records"):
        fcntl.flock = _refuse  # as NFS does for a file that is not open for writing
    with WriterLock(Path(path), "the folder", "choose another", is_stopping=stopping.is_set) as lock:
        if what.startswith("with a worker") and os.fork() == 0:
            select.select([sys.stdin], [], [])
            os._exit(0)
        print("held", flush=True)
        if what == "stopping":
            stopping.set()
        sys.stdin.read()
        print("contended" if lock.contended_at() > 0 else "never contended", flush=True)


def _refuse(*arguments: object) -> None:
    raise OSError(errno.EBADF, os.strerror(errno.EBADF))


if __name__ == "__main__":
    main(*sys.argv[1:])
