"""Tests the cache of open files: its reads, the number of open files, and its behaviour after failures."""

import contextlib
import errno
import os
import pickle
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from beit3_ds.benchmarks.data.file_calls import count_file_calls
from beit3_ds.data.files.descriptors import FileChangedError, OpenFiles, raise_open_file_limit


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """Writes ten files; each consists of bytes equal to the file's number."""
    for number in range(10):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 100)
    return [str(tmp_path / str(number)) for number in range(10)]


@pytest.fixture
def open_limit() -> Iterator[None]:
    """Restores the limit on open files after a test."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_file_is_opened_once_and_read_with_one_call(paths: list[str]) -> None:
    files = OpenFiles()
    with count_file_calls() as calls:
        for _ in range(5):
            assert [files.read(path, 10, 3) for path in paths] == [bytes([n]) * 3 for n in range(10)]
    assert (calls.opens, calls.reads) == (10, 50)  # catches an open, or a second read, per record


def test_the_least_recently_used_file_is_closed(paths: list[str]) -> None:
    files = OpenFiles(limit=3)
    for path in [*paths[:3], paths[0], paths[3]]:
        files.read(path, 0, 1)
    assert files.num_open == 3
    with count_file_calls() as calls:
        files.read(paths[0], 0, 1)
        assert calls.opens == 0  # catches the oldest instead of the least recently used
        assert files.read(paths[1], 0, 2) == b"\1\1"
    assert calls.opens == 1


def test_more_files_than_the_process_may_open(paths: list[str], open_limit: None) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = OpenFiles(limit=1000)
    for path in paths[:4]:
        files.read(path, 0, 1)
    top = max(int(name) for name in os.listdir("/proc/self/fd")) + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (top + 4, hard))
    held: list[int] = []
    with contextlib.suppress(OSError):  # others take the rest
        while len(held) < 1000:
            held.append(os.open(paths[0], os.O_RDONLY))
    assert 0 < len(held) < 1000
    try:
        assert files.read(paths[9], 0, 2) == b"\t\t"  # catches EMFILE that ends the run though files could be closed
        assert 0 < files.num_open < 4
    finally:
        for descriptor in held:
            os.close(descriptor)


def test_no_more_than_half_of_what_the_process_may_open(paths: list[str], open_limit: None) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    top = max(int(name) for name in os.listdir("/proc/self/fd")) + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(64, top + 16), hard))
    files = OpenFiles(limit=10**6)
    for number in range(64):
        os.link(paths[0], f"{paths[0]}-{number}")
    for number in range(64):
        files.read(f"{paths[0]}-{number}", 0, 1)
    assert files.num_open <= max(64, top + 16) // 2


def test_the_limit_is_raised_as_far_as_the_hard_one(open_limit: None) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    raise_open_file_limit(300)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(600, hard)
    raise_open_file_limit(10)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(600, hard)  # catches a limit that is lowered
    raise_open_file_limit(10**9)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == (hard if hard != resource.RLIM_INFINITY else 2 * 10**9)


def test_a_stale_descriptor_is_reopened_once(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    files = OpenFiles()
    files.read(paths[0], 0, 1)
    stale = {files._descriptor(paths[0], None)}
    pread = os.pread

    def pread_of_network(descriptor: int, size: int, offset: int) -> bytes:
        if descriptor in stale:
            stale.clear()
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", pread_of_network)
    assert files.read(paths[0], 0, 2) == b"\0\0"

    def gone(descriptor: int, size: int, offset: int) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(os, "pread", gone)
    with pytest.raises(OSError, match="tale"):  # catches a loop without an end
        files.read(paths[0], 0, 2)
    assert files.num_open == 0


def test_a_file_that_is_another_than_expected_is_refused_at_every_opening(paths: list[str]) -> None:
    status = os.stat(paths[0])
    expected = status.st_size, status.st_mtime_ns
    files = OpenFiles(limit=1)
    assert files.read(paths[0], 0, 1, expected) == b"\0"
    Path(paths[0]).write_bytes(b"other" * 20)  # of the same size
    os.utime(paths[0], ns=(1, 1))
    files.read(paths[1], 0, 1)
    for _ in range(2):  # catches a file that passes once it is kept
        with pytest.raises(FileChangedError):
            files.read(paths[0], 0, 1, expected)


def test_a_pickled_copy_opens_its_own(paths: list[str]) -> None:
    files = OpenFiles(limit=7)
    files.read(paths[2], 0, 1)
    copy = pickle.loads(pickle.dumps(files))
    assert copy.num_open == 0
    assert copy.read(paths[2], 0, 2) == b"\2\2"


def test_a_fork_reads_its_own_while_a_thread_of_the_parent_reads(paths: list[str]) -> None:
    files = OpenFiles(limit=2)
    end = threading.Event()

    def read() -> None:
        while not end.is_set():
            for number, path in enumerate(paths):
                assert files.read(path, 0, 2) == bytes([number]) * 2

    thread = threading.Thread(target=read)
    thread.start()
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    status = sum(files.read(path, 0, 2) != bytes([n]) * 2 for n, path in enumerate(paths))
                finally:
                    os._exit(status)
            assert os.waitpid(child, 0)[1] == 0  # catches a lock that was held at the fork, and a mixed-up descriptor
    finally:
        end.set()
        thread.join()


def test_maps_hold_no_descriptor_and_are_read_only(paths: list[str]) -> None:
    files = OpenFiles()
    before = len(os.listdir("/proc/self/fd"))
    maps = [files.map(path, 100) for path in paths]
    assert len(os.listdir("/proc/self/fd")) == before  # catches Python's maps, which keep one each
    assert [int(m.sum()) for m in maps] == [100 * n for n in range(10)]
    with pytest.raises(ValueError, match="read-only"):
        maps[0][0] = 1
    os.unlink(paths[0])
    np.testing.assert_array_equal(files.map(paths[0], 100), 0)
    with pytest.raises(OSError, match="truncated"):
        files.map(paths[1], 101)
    with pytest.raises(OSError, match="No such file"):
        OpenFiles().map(paths[0], 100)


def test_descriptors_end_with_the_object(paths: list[str]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    files = OpenFiles()
    for path in paths:
        files.read(path, 0, 1)
    del files
    assert len(os.listdir("/proc/self/fd")) == before


def test_places_that_no_file_has(paths: list[str]) -> None:
    with pytest.raises(ValueError, match="not a range"):
        OpenFiles().read(paths[0], -1, 5)  # catches a damaged index that looks like a failing file system
    assert OpenFiles().read(paths[0], 98, 5) == b"\0\0"
    assert OpenFiles().read(paths[0], 500, 5) == b""
