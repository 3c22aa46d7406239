"""Keeps files open between reads, in a bounded cache of file descriptors and memory maps.

Opening a file is the slowest operation on a shared file system. A shard that is already open needs only one system call
per record.
"""

import errno
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

DEFAULT_MAX_OPEN_FILES = 4096
"""Maximum number of files that a process keeps open; the default of `data.max_open_files`."""

_MAX_MAPS = 32_768  # Linux allows 65,530 maps per process, including those of libraries (vm.max_map_count)
_TOO_MANY = (errno.EMFILE, errno.ENFILE)

ItemT = TypeVar("ItemT")


class FileChangedError(OSError):
    """Signals that the size or modification time of a file has changed."""


class OpenFiles:
    """Reads byte ranges of files and maps files into memory; keeps the most recently used files open.

    The cache keeps at most `limit` descriptors open, and at most half of the process's limit of open files. If the
    system refuses to open another file, the cache closes half of the files. If a network file system invalidates an
    open file (ESTALE), the cache reopens the file once.

    Threads can share an instance. A pickled copy starts with no open file.
    """

    def __init__(self, limit: int = DEFAULT_MAX_OPEN_FILES) -> None:
        """Creates an empty cache.

        Args:
            limit: maximum number of descriptors that stay open, at least 1.
        """
        assert limit >= 1, f"at least one file must stay open, not {limit}"
        self._limit = limit
        self._start()

    def read(self, path: str, offset: int, size: int, expected: tuple[int, int] | None = None) -> bytes:
        """Returns `size` bytes of a file from `offset` on, or fewer if the file ends earlier.

        Args:
            path: path of the file.
            offset: position of the first byte.
            size: number of bytes.
            expected: expected size in bytes and modification time in nanoseconds, checked when the file is opened. None
                skips the check.

        Raises:
            FileChangedError: if the size or modification time differs from `expected`.
            OSError: if the file cannot be opened or read.
            ValueError: if `offset` or `size` is negative.
            OverflowError: if `offset` exceeds the size of the largest possible file.
        """
        if min(offset, size) < 0:
            raise ValueError(f"{size} bytes at {offset} are not a range of a file")
        with self._exclusive():
            for is_last_attempt in (False, True):
                try:
                    return read_fully(self._descriptor(path, expected), offset, size)
                except OSError as error:
                    self._descriptors.pop(path)
                    if is_last_attempt or error.errno != errno.ESTALE:
                        raise
        raise AssertionError("the last attempt returns or raises")

    def map(self, path: str, size: int) -> NDArray[np.uint8]:
        """Returns the first `size` bytes of a file as a read-only memory map, (size,) uint8.

        Raises:
            OSError: if the file is missing or has fewer bytes.
        """
        with self._exclusive():
            found = self._maps.get(path)
            if found is None or len(found) < size:
                found = map_file(path, size)
                self._maps.put(path, found)
            return found[:size]

    @property
    def num_open(self) -> int:
        """Returns the number of file descriptors in the cache."""
        return len(self._descriptors)

    def __getstate__(self) -> dict[str, Any]:
        return {"_limit": self._limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._limit = state["_limit"]
        self._start()

    def _start(self) -> None:
        self._descriptors: _Recent[int] = _Recent(os.close)
        self._maps: _Recent[NDArray[np.uint8]] = _Recent(_forget)
        self._lock, self._process = threading.Lock(), os.getpid()

    def _exclusive(self) -> threading.Lock:
        if self._process != os.getpid():
            # Another thread may have held the lock during the fork. The descriptors are copies of this process, and
            # reads at a given offset do not share a position with the parent.
            self._lock, self._process = threading.Lock(), os.getpid()
        return self._lock

    def _descriptor(self, path: str, expected: tuple[int, int] | None) -> int:
        descriptor = self._descriptors.get(path)
        if descriptor is None:
            descriptor = self._open(path)
            # Stored before the check, so that it is closed even if the check fails.
            self._descriptors.put(path, descriptor)
            self._descriptors.shrink_to(self._capacity())
            if expected is not None:
                _check_unchanged(descriptor, expected)
        return descriptor

    def _open(self, path: str) -> int:
        while True:
            try:
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                if error.errno not in _TOO_MANY or not len(self._descriptors):
                    raise
            self._descriptors.shrink_to(len(self._descriptors) // 2)

    def _capacity(self) -> int:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return self._limit if soft == resource.RLIM_INFINITY else max(1, min(self._limit, soft // 2))


def raise_open_file_limit(max_open_files: int) -> None:
    """Raises this process's soft limit of open files to twice `max_open_files`, or to the hard limit if that is lower.

    `OpenFiles` uses at most half of the soft limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * max_open_files  # OpenFiles uses half of the limit
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class _Recent(Generic[ItemT]):
    """Least-recently-used cache of items by path; calls `release` on each item that leaves the cache."""

    def __init__(self, release: Callable[[ItemT], None]) -> None:
        self._items: OrderedDict[str, ItemT] = OrderedDict()
        self._release = release

    def __len__(self) -> int:
        return len(self._items)

    def get(self, path: str) -> ItemT | None:
        if path not in self._items:
            return None
        self._items.move_to_end(path)
        return self._items[path]

    def put(self, path: str, item: ItemT) -> None:
        self.pop(path)
        self._items[path] = item
        self.shrink_to(_MAX_MAPS)

    def pop(self, path: str) -> None:
        if path in self._items:
            self._release(self._items.pop(path))

    def shrink_to(self, count: int) -> None:
        while len(self._items) > count:
            self._release(self._items.popitem(last=False)[1])

    def __del__(self) -> None:
        self.shrink_to(0)


def _forget(item: object) -> None:
    """Does nothing: Python frees a memory map as soon as no array uses it."""


def _check_unchanged(descriptor: int, expected: tuple[int, int]) -> None:
    status = os.fstat(descriptor)
    found = status.st_size, status.st_mtime_ns
    if found != expected:
        raise FileChangedError(f"it has size and mtime_ns {found}, but had {expected} when it was indexed")


def read_fully(descriptor: int, offset: int, size: int) -> bytes:
    """Returns `size` bytes of an open file from `offset` on, or fewer if the file ends earlier.

    Repeats the read if the system returns only a part of the bytes.

    Raises:
        OSError: if the file cannot be read.
    """
    data = os.pread(descriptor, size, offset)
    if len(data) == size:
        return data
    parts = [data]  # after a signal, or on a file system that returns less at a time
    while data:
        offset, size = offset + len(data), size - len(data)
        data = os.pread(descriptor, size, offset) if size else b""
        parts.append(data)
    return b"".join(parts)


def map_file(path: str, size: int) -> NDArray[np.uint8]:
    """Memory-maps the first `size` bytes of a file read-only, (size,) uint8; keeps no file descriptor.

    Raises:
        OSError: if the file is missing or has fewer bytes.
    """
    if size == 0:  # an empty range cannot be mapped
        return np.empty(0, dtype=np.uint8)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_size < size:
            raise OSError("the file is truncated")
        # Python's maps keep a duplicate of the descriptor, so thousands of them would exceed the limit of open files.
        # Torch opens files by name, and refuses names that are not UTF-8, hence the name in /proc. The map is private,
        # so that the file may be read-only; nothing is ever written.
        name = f"/proc/self/fd/{descriptor}"
        data = torch.from_file(name, shared=False, size=size, dtype=torch.uint8).numpy()
    except RuntimeError as error:
        raise OSError(f"it cannot be mapped: {str(error).splitlines()[0]}") from error
    finally:
        os.close(descriptor)
    data.flags.writeable = False
    return data
