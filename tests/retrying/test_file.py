"""Tests that a file is complete in the end, even if its disk fails at any moment."""

import errno
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

from hypothesis import given
from hypothesis import strategies as st

from beit3_ds.retrying.file import RetryingFile
from tests.retrying.failing_disk import MOMENTS, failing_disk

LINES = st.lists(st.binary(max_size=20).map(lambda line: line.replace(b"\n", b"") + b"\n"), max_size=20)


@given(lines=LINES, moments=MOMENTS, has_lines=st.booleans(), reopened=st.booleans())
def test_any_failures_leave_the_same_file(
    lines: list[bytes], moments: list[int | None], has_lines: bool, reopened: bool
) -> None:
    """Catches lines that are lost, repeated, torn or out of order; `content` must be complete at any time."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "logs" / "metrics.jsonl"
        said: list[str] = []
        file = RetryingFile(path, said.append, has_lines=has_lines)
        with failing_disk(moments):
            for number, line in enumerate(lines):
                file.append(line)
                assert file.content() == b"".join(lines[: number + 1])
                assert said == [] or file.has_failed == said[-1].startswith("WARNING")
        assert file.retry() and not file.has_failed
        assert (path.read_bytes() if lines else b"") == b"".join(lines)
        assert [line.startswith("WARNING") for line in said] == [number % 2 == 0 for number in range(len(said))]


@given(lines=LINES, moments=MOMENTS, kept=st.binary(max_size=20))
def test_a_replacement_waits_for_room_and_comes_before_later_lines(
    lines: list[bytes], moments: list[int | None], kept: bytes
) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        path.write_bytes(b"old\n")
        file = RetryingFile(path, lambda line: None, has_lines=False)
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with mock.patch("os.fsync", side_effect=full):  # of the atomic write
            file.replace(kept)
            assert path.read_bytes() == b"old\n" and file.content() == kept
            for line in lines[:2]:
                file.append(line)
        with failing_disk(moments):
            for line in lines[2:]:
                file.append(line)
        assert file.retry()
        assert path.read_bytes() == kept + b"".join(lines)


def test_a_file_that_changes_meanwhile_gets_whole_lines(tmp_path: Path) -> None:
    """Catches a remaining half line after somebody has deleted a part of the file to free space."""
    path = tmp_path / "metrics.jsonl"
    file = RetryingFile(path, lambda line: None)
    file.append(b"one\n")
    with failing_disk([2, 0, 0]):
        file.append(b"two\n")
        assert path.read_bytes() == b"one\ntw"
        path.unlink()
        file.append(b"three\n")
    assert file.retry() and path.read_bytes() == b"two\nthree\n"
    with failing_disk([2, 0, 0]):
        file.append(b"four\n")
        path.write_bytes(b"of another hand")
        file.append(b"five\n")
    assert file.retry() and path.read_bytes() == b"of another hand\nfour\nfive\n"


def test_an_error_when_the_file_is_closed_counts(tmp_path: Path) -> None:
    """Catches lines that a network file system accepts, but reports as not stored when the file is closed."""
    file = RetryingFile(tmp_path / "metrics.jsonl", lambda line: None)
    file.append(b"one\n")
    close = os.close

    def lose(descriptor: int) -> None:
        os.ftruncate(descriptor, 5)
        close(descriptor)
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with mock.patch("os.close", lose):
        file.append(b"two\n")
    assert file.has_failed and file.content() == b"one\ntwo\n"
    assert file.retry() and file.path.read_bytes() == b"one\ntwo\n"


def test_a_folder_that_is_gone_is_created_again(tmp_path: Path) -> None:
    said: list[str] = []
    file = RetryingFile(tmp_path / "run" / "metrics.jsonl", said.append)
    (tmp_path / "run").write_text("in the way")
    file.append(b"one\n")
    assert said == [
        f"WARNING: {file.path} cannot be written: File exists. The run continues and writes the missing part once that "
        "is possible."
    ]
    (tmp_path / "run").unlink()
    file.append(b"two\n")
    assert file.path.read_bytes() == b"one\ntwo\n" and said[1:] == [f"{file.path} is complete again"]
