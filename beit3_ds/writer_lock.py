"""Ensures that only one process at a time writes to a folder or file, even on storage shared by several hosts."""

import contextlib
import errno
import fcntl
import json
import math
import os
import stat
import struct
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from beit3_ds.config import ConfigError
from beit3_ds.lock_holder import Holder, describe_holder, parse_holder, this_process
from beit3_ds.storage_error import StorageError

WAIT_SECONDS = 120.0
"""Maximum seconds to wait for a lock whose holder is stopping or shows no sign of life. An NFS server keeps the lock of
a crashed host for 90 s."""
SILENT_SECONDS = 8.0
"""Seconds without a sign of life after which the holder of a lock counts as gone. Used where the file system does not
show whether the lock is still held. A sign of life is a new modification time of the lock file. An NFS client may
notice a new time several seconds late."""
_BEAT_SECONDS = 1.0
_POLL_SECONDS = 0.2
_NOTICE_SECONDS = 0.6  # wait before the first message, so that a new holder can write its name
_MOST_BYTES = 4096
_HOLDER, _WAITING = 0, 1  # bytes of the file that the holder and the waiting processes lock
_FLOCK = "@hhqqi4x"  # struct flock of fcntl.h
_HELD_ELSEWHERE = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class WaitStoppedError(Exception):
    """Reports that a stop signal arrived while this process waited for a lock."""


def _never() -> bool:
    return False


class WriterLock:
    """Gives this process the exclusive right to write to a folder or file during a `with` block.

    The lock is on a small lock file, which names the holder and is deleted after the block. The kernel releases the
    lock when the process ends in any way. An NFS server also releases the locks of a crashed host. One of two kinds of
    lock is used:

    * flock on a lock file that is open for reading only. Such an open file does not prevent a read-only remount of the
      disk. Forked processes inherit such a lock, and a data worker that outlives its rank would keep the lock. Forked
      processes therefore close the lock file.
    * A POSIX record lock, if flock requires a file that is open for writing, as on NFS. A process loses a record lock
      when any of its code opens and closes the lock file. A thread of the holder therefore takes the lock again every
      second.

    A thread of the holder also updates the time of the lock file every second, as a sign of life. A process that wants
    the lock is refused at once while the holder shows signs of life and is not stopping. Otherwise, the process waits
    for the lock for at most `WAIT_SECONDS`, and fails if the lock is still taken. On file systems without locks, only
    the sign of life shows that there is a holder.
    """

    def __init__(
        self,
        path: Path,
        target: str,
        way_out: str,
        *,
        command: str | None = None,
        is_stopping: Callable[[], bool] = _never,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        """Stores the arguments. Entering the `with` block takes the lock.

        Args:
            path: path of the lock file; its folder must exist.
            target: what the lock protects, such as "training.output_dir=runs/a", for messages.
            way_out: what a refused user can do, such as "choose another training.output_dir".
            command: what this process does, for messages of other processes; None uses the process's command line.
            is_stopping: function that returns whether this process has received a stop signal. While this process waits
                for the lock, a stop signal ends the wait. While this process holds the lock, a stop signal is recorded
                in the lock file, so that other processes wait for the lock and are not refused.
            end: function that ends this process at once with an exit status. Called if another process has taken over
                the lock.
        """
        self.path, self._target, self._way_out, self._is_stopping = path, target, way_out, is_stopping
        self._end = end
        self._own = this_process(command)
        self._file, self._uses_records = -1, False
        self._written: Holder | None = None
        self._contended_at = -math.inf
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="writer lock", daemon=True)

    def __enter__(self) -> "WriterLock":
        """Takes the lock.

        Raises:
            ConfigError: if the lock file cannot be used, or if the holder shows signs of life and is not stopping. In
                the second case, the message names the holder's host and process.
            StorageError: if a holder that is stopping or shows no sign of life keeps the lock for `WAIT_SECONDS`.
            WaitStoppedError: if this process receives a stop signal while it waits for the lock.
        """
        try:
            self._acquire()
        except BaseException as error:
            self._close()
            if not isinstance(error, OSError):
                raise
            raise ConfigError(
                f"{self._target}: the lock {self.path} cannot be taken: {error.strerror or error}. If no other process "
                f"writes there, delete that file; else {self._way_out}."
            ) from None
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Deletes the lock file and releases the lock."""
        if os.getpid() != self._own.pid:
            return  # a forked process, which has no lock
        self._over.set()
        self._thread.join(_BEAT_SECONDS)
        if self._thread.is_alive():
            return  # its storage hangs; the kernel releases the lock when this process ends
        with contextlib.suppress(OSError):
            if self._is_current() and not self._is_named_for_another(self._look()[0]):
                self.path.unlink()
        self._close()

    def contended_at(self) -> float:
        """Returns the monotonic time at which another process was last seen waiting for this lock; -inf if never."""
        return self._contended_at

    def _acquire(self) -> None:
        began = time.monotonic()
        first_beat, changed_at, is_noticed = None, began, False
        is_locked: bool | None = None
        self._file = self._open()
        while True:
            is_locked = is_locked or self._try_to_hold()
            if not self._is_current():  # its holder has just deleted it
                self._close()
                self._file, is_locked, first_beat = self._open(), None, None
                continue
            if is_locked is False:
                _try_record(self._file, _WAITING, fcntl.LOCK_SH)  # see `contended_at`
            holder, beat, is_empty = self._look()
            # If the file system keeps locks to one host, a taken lock says nothing about processes on other hosts.
            if (is_locked is not False and is_empty) or (is_locked and holder and holder.boot == self._own.boot):
                break
            now = time.monotonic()
            if first_beat is None:
                first_beat, changed_at = beat, now
            is_alive, is_leaving = beat != first_beat, holder is not None and holder.is_stopping
            if is_alive and not is_leaving:
                raise self._refusal(holder)
            if is_alive:
                first_beat, changed_at = beat, now
            if is_locked is not False and now - changed_at >= SILENT_SECONDS:
                break
            if now - began >= WAIT_SECONDS:
                raise StorageError(
                    f"{self._target} is in use by {describe_holder(holder)}: the lock {self.path} was not released "
                    f"within {WAIT_SECONDS:.0f} s. If that process hangs, end it; then start the same command again."
                )
            if not is_noticed and now - began >= _NOTICE_SECONDS:
                is_noticed = True
                print(
                    f"waiting for {self._target}, which is in use by {describe_holder(holder)}",
                    file=sys.stderr,
                    flush=True,
                )
            if self._is_stopping():
                raise WaitStoppedError(f"stopped while waiting for {self._target}, in use by {describe_holder(holder)}")
            time.sleep(_POLL_SECONDS)
        self._write_name(shares_no_locks=is_locked is None)

    def _write_name(self, *, shares_no_locks: bool) -> None:
        with contextlib.suppress(OSError):  # the disk may be full; the thread tries again
            self._write(self._own)
        if not shares_no_locks:
            return
        print(
            f"WARNING: the file system of {self.path} has no locks. Another process that writes there is recognised by "
            "that file's time alone, and only if it does not start at the same moment.",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(2 * _BEAT_SECONDS)  # if two start at the same moment, the one that wrote last continues
        holder, _, _ = self._look()
        if holder is not None and holder != self._own:
            raise self._refusal(holder)

    def _try_to_hold(self) -> bool | None:
        """Tries to take the lock without waiting. Has no effect if this process already holds it.

        Returns:
            True if this process holds the lock, False if another process holds it, and None if the file system has no
            locks.
        """
        if not self._uses_records:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _HELD.add(self)
                return True
            except OSError as error:
                if error.errno in _HELD_ELSEWHERE:
                    return False
                if error.errno in _NO_LOCKS:
                    return None
                if error.errno != errno.EBADF:
                    raise
            self._close()
            self._uses_records = True
            self._file = self._open()
        return _try_record(self._file, _HOLDER, fcntl.LOCK_EX)

    def _open(self) -> int:
        """Opens or creates the lock file, and returns its descriptor. Follows no symbolic link and waits for no pipe.

        Raises:
            OSError: if the file cannot be opened or is not a regular file.
        """
        with contextlib.suppress(FileNotFoundError):
            _check_regular(self.path.lstat())  # before opening, because opening a device may have effects
        access = os.O_RDWR if self._uses_records else os.O_RDONLY
        flags = access | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = os.open(self.path, flags, 0o666)
        try:
            _check_regular(os.fstat(file))
        except OSError:
            os.close(file)
            raise
        return file

    def _is_current(self) -> bool:
        """Returns whether the open file is still the one at `path`, and has not been deleted or replaced."""
        try:
            return os.path.samestat(os.fstat(self._file), os.stat(self.path, follow_symlinks=False))
        except FileNotFoundError:
            return False

    def _look(self) -> tuple[Holder | None, int, bool]:
        """Returns the holder named in the lock file, the time of the holder's last sign of life, and whether the file
        is empty.

        The holder is None if the file's content is invalid. The time is the file's modification time in nanoseconds.
        Reads through the open descriptor, because closing a second descriptor would release this process's record
        locks.
        """
        text = os.pread(self._file, _MOST_BYTES, 0)
        return parse_holder(text), os.fstat(self._file).st_mtime_ns, not text

    def _write(self, holder: Holder) -> None:
        text = json.dumps(holder._asdict()).encode()
        # Closing a second open file would release a record lock.
        file = self._file if self._uses_records else os.open(self.path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if os.path.samestat(os.fstat(file), os.fstat(self._file)):
                os.pwrite(file, text, 0)
                os.ftruncate(file, len(text))
                self._written = holder
        finally:
            if file != self._file:
                os.close(file)

    def _beat(self) -> None:
        while not self._over.wait(_BEAT_SECONDS):
            with contextlib.suppress(OSError):
                self._check_is_held()
                self._look_for_others()
                os.utime(self._file)  # waiting processes see this and end, so look for them before and after it
                self._look_for_others()
                current = self._own._replace(is_stopping=bool(self._is_stopping()))
                if current != self._written:
                    self._write(current)

    def _check_is_held(self) -> None:
        """Takes the lock again, or ends this process if another process now has the lock.

        An NFS server gives the lock to another host if this host is unreachable for longer than the lease time.
        """
        is_locked, (holder, _, _) = self._try_to_hold(), self._look()
        if is_locked is False or self._is_named_for_another(holder):
            print(
                f"error: {self._target} is now in use by {describe_holder(holder)}, because this process (host "
                f"{self._own.host}) was cut off from it; this process ends without a further write",
                file=sys.stderr,
                flush=True,
            )
            self._end(1)

    def _is_named_for_another(self, holder: Holder | None) -> bool:
        return self._written is not None and holder is not None and holder != self._written

    def _look_for_others(self) -> None:
        # Only asks which process holds this byte, because taking the lock needs a file open for writing.
        wanted = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, _WAITING, 1, 0)
        found, *_ = struct.unpack_from("h", fcntl.fcntl(self._file, fcntl.F_GETLK, wanted))
        if found != fcntl.F_UNLCK:
            self._contended_at = time.monotonic()

    def _close(self) -> None:
        """Closes the lock file. This releases the lock, unless the process inherited the file by a fork."""
        _HELD.discard(self)
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _refusal(self, holder: Holder | None) -> ConfigError:
        return ConfigError(
            f"{self._target} is in use by {describe_holder(holder)}. Wait for its end, end it, or {self._way_out}."
        )


_HELD: "weakref.WeakSet[WriterLock]" = weakref.WeakSet()
"""Locks that this process holds by flock. A forked process closes the lock files that it inherits (`WriterLock`)."""


def _close_inherited() -> None:
    for lock in list(_HELD):
        lock._close()


os.register_at_fork(after_in_child=_close_inherited)


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file")


def _try_record(file: int, byte: int, kind: int) -> bool | None:
    """Tries to take a record lock on one byte of a file without waiting.

    Returns:
        True if this process holds the lock, False if another process holds it, and None if the file system has no
        locks.

    Raises:
        OSError: if the file system fails in another way.
    """
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB, 1, byte)
    except OSError as error:
        if error.errno in _HELD_ELSEWHERE:
            return False
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True
