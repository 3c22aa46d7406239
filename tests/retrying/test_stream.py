"""Tests that a stream is complete in the end even if its disk fails, and that no error ends its writer."""

import errno
import os
import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from beit3_ds.retrying.stream import RetryingStream
from tests.retrying.failing_disk import MOMENTS, failing_disk


@given(
    chunks=st.lists(st.binary(max_size=40), max_size=20),
    moments=MOMENTS,
    code=st.sampled_from([errno.ENOSPC, errno.EIO, errno.EROFS, errno.EAGAIN]),
)
def test_any_failures_leave_the_same_bytes(chunks: list[bytes], moments: list[int | None], code: int) -> None:
    with tempfile.TemporaryFile() as file:
        told: list[OSError] = []
        stream = RetryingStream(file.fileno, told.append)
        with failing_disk(moments, code):
            for chunk in chunks:
                assert stream.write(chunk) == len(chunk)
        assert stream.retry() and stream.num_missing == 0
        file.seek(0)
        assert file.read() == b"".join(chunks)
        assert bool(told) <= (code != errno.EAGAIN)


def test_an_error_is_told_once_until_writing_succeeds(tmp_path: Path) -> None:
    told: list[OSError] = []
    with open(tmp_path / "log", "wb") as file:
        stream = RetryingStream(file.fileno, told.append)
        with failing_disk([0, 0, 0]):
            for _ in range(3):
                stream.write(b"line\n")
        stream.write(b"line\n")
        with failing_disk([0]):
            stream.write(b"line\n")
        stream.finish()
    assert len(told) == 2 and (tmp_path / "log").read_bytes() == b"line\n" * 5


def test_what_exceeds_the_limit_is_counted_in_the_stream(tmp_path: Path) -> None:
    """Catches memory that grows without limit while a disk stays full."""
    with open(tmp_path / "log", "wb") as file:
        stream = RetryingStream(file.fileno, lambda error: None, limit=10)
        with failing_disk([0] * 9):
            for _ in range(5):
                stream.write(b"12345\n")
            assert stream.num_missing == 30
        stream.write(b"late\n")  # still in order: it counts as missing
        stream.write(b"later\n")
    assert (tmp_path / "log").read_bytes() == b"12345\n\n[29 bytes of output are missing here]\nlater\n"


def test_a_pipe_without_a_reader_takes_everything_silently() -> None:
    told: list[OSError] = []
    readable, writable = os.pipe()
    os.close(readable)
    stream = RetryingStream(lambda: writable, told.append)
    for _ in range(3):
        assert stream.write(b"line\n") == 5
    assert (told, stream.num_missing, stream.has_reader) == ([], 0, False)
    os.close(writable)


def test_a_file_that_cannot_be_opened_is_tried_again(tmp_path: Path) -> None:
    def open_log() -> int:
        return os.open(tmp_path / "later" / "log", os.O_WRONLY | os.O_CREAT)

    stream = RetryingStream(open_log, lambda error: None)
    stream.write(b"early\n")
    (tmp_path / "later").mkdir()
    stream.write(b"late\n")
    assert (tmp_path / "later" / "log").read_bytes() == b"early\nlate\n"


def test_a_full_pipe_that_does_not_block_is_waited_for_at_the_end() -> None:
    """Catches output that is lost at the end because another program has made the terminal non-blocking."""
    import threading

    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    content = os.urandom(1 << 20)
    stream = RetryingStream(lambda: writable, lambda error: None)
    stream.write(content)
    assert stream.num_missing > 0
    read: list[bytes] = []

    def drain() -> None:
        while chunk := os.read(readable, 1 << 16):
            read.append(chunk)

    reader = threading.Thread(target=drain)
    reader.start()
    stream.finish()
    os.close(writable)
    reader.join()
    os.close(readable)
    assert b"".join(read) == content


def test_a_forked_process_leaves_the_missing_bytes_to_its_parent(tmp_path: Path) -> None:
    """Catches output that forked data-loader workers write a second time."""
    with open(tmp_path / "log", "ab") as file:
        stream = RetryingStream(file.fileno, lambda error: None)
        with failing_disk([0]):
            stream.write(b"parent\n")
        child = os.fork()
        if child == 0:
            stream.write(b"child\n")
            os._exit(0)
        os.waitpid(child, 0)
        stream.retry()
    assert sorted((tmp_path / "log").read_bytes().splitlines()) == [b"child", b"parent"]
