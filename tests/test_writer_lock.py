"""Tests that one process at a time writes a folder, also after crashes and on file systems without locks."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_ds import writer_lock
from beit3_ds.config import ConfigError
from beit3_ds.lock_holder import Holder, parse_holder
from beit3_ds.storage_error import StorageError
from beit3_ds.writer_lock import WaitStoppedError, WriterLock
from tests.file_state import file_state

ROOT = Path(__file__).parents[1]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.lock"


@pytest.fixture
def start(path: Path) -> Iterator[Start]:
    """Provides a function that starts processes that hold the lock; ends them after the test."""
    with contextlib.ExitStack() as stack:

        def start_one(what: str = "") -> "subprocess.Popen[str]":
            command = [sys.executable, "-m", "tests.lock_holder", str(path), what]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            process = stack.enter_context(subprocess.Popen(command, cwd=ROOT, text=True, **pipes))  # type: ignore[call-overload]
            stack.callback(process.kill)
            assert process.stdout.readline() == "held\n"
            return process

        yield start_one


def lock(path: Path, **more: Any) -> WriterLock:
    return WriterLock(path, "the folder", "choose another", **more)


def end(process: "subprocess.Popen[str]") -> str:
    output, _ = process.communicate(timeout=30)
    return output


def write_holder(path: Path, **changes: Any) -> None:
    holder = Holder("elsewhere", 7, "2026-01-01 00:00:00", "train", "another kernel", False)._replace(**changes)
    path.write_text(json.dumps(holder._asdict()))


@contextlib.contextmanager
def beating(path: Path) -> Iterator[None]:
    """Updates the lock's sign of life, like a holder on another host."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(0.1):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    yield
    over.set()
    thread.join()


def test_a_living_holder_is_named_to_others(path: Path, start: Start) -> None:
    holder = start()
    began = time.monotonic()
    with pytest.raises(ConfigError) as refused, lock(path):
        pass
    assert time.monotonic() - began < 5
    message = str(refused.value)
    assert f"the folder is in use by process {holder.pid} on host {socket.gethostname()} (" in message
    assert "tests.lock_holder" in message and message.endswith("Wait for its end, end it, or choose another.")
    assert json.loads(path.read_text())["pid"] == holder.pid  # a refused process changes nothing
    assert end(holder) == "contended\n"
    assert not path.exists()
    with lock(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


def refuse_flock(*arguments: Any) -> None:
    """Fails like a file system that refuses flock on files not open for writing, such as NFS."""
    raise OSError(errno.EBADF, os.strerror(errno.EBADF))


def test_the_disk_can_be_mounted_read_only(path: Path) -> None:
    """Catches a lock file that stays open for writing, because the kernel then refuses a read-only remount."""
    with lock(path) as own:
        time.sleep(0.1)
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if os.path.samestat(os.stat(f"/proc/self/fd/{name}"), path.stat()):
                    assert fcntl.fcntl(int(name), fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        assert not own._uses_records


def test_record_locks_exclude_others_where_flock_needs_a_writable_file(
    path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", refuse_flock)
    holder = start("with records")
    with pytest.raises(ConfigError, match=f"in use by process {holder.pid} "), lock(path):
        pass
    time.sleep(1.5)  # until the holder's next sign of life
    assert end(holder) == "contended\n"
    with lock(path) as own:
        assert own._uses_records


@pytest.mark.parametrize("records", ["", " and records"])
def test_a_killed_holder_is_replaced_at_once_though_its_workers_live(
    path: Path, start: Start, records: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a lock that forked processes keep after the holder was killed."""
    if records:
        monkeypatch.setattr(fcntl, "flock", refuse_flock)
    holder = start(f"with a worker{records}")
    holder.kill()
    holder.wait()
    assert json.loads(path.read_text())["pid"] == holder.pid
    began = time.monotonic()
    with lock(path) as own:
        assert time.monotonic() - began < 0.5
        assert own.contended_at() < 0
    assert holder.stdin is not None
    holder.stdin.close()  # ends the worker


def test_a_holder_without_a_sign_of_life_is_waited_for(
    path: Path, start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    holder = start()
    holder.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(writer_lock, "WAIT_SECONDS", 1.0)
    with pytest.raises(StorageError, match=f"process {holder.pid} .*not released within 1 s"), lock(path):
        pass
    monkeypatch.undo()
    threading.Timer(1, holder.kill).start()
    with lock(path):
        assert holder.poll() is not None
    assert f"waiting for the folder, which is in use by process {holder.pid}" in capsys.readouterr().err


def test_a_holder_that_stops_is_waited_for(path: Path, start: Start) -> None:
    holder = start("stopping")
    while not json.loads(path.read_text())["is_stopping"]:
        time.sleep(0.05)
    with pytest.raises(WaitStoppedError, match="stopped while waiting for the folder, in use by process"):
        lock(path, is_stopping=lambda: True).__enter__()
    assert holder.stdin is not None
    threading.Timer(1.5, holder.stdin.close).start()  # after some signs of life
    with lock(path):
        assert holder.wait(30) == 0


def without_locks(*arguments: Any) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_signs_of_life_tell_without_locks(
    path: Path, start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    holder = start()
    for name in ("flock", "lockf"):
        monkeypatch.setattr(fcntl, name, without_locks)
    monkeypatch.setattr(writer_lock, "SILENT_SECONDS", 1.5)
    monkeypatch.setattr(writer_lock, "_BEAT_SECONDS", 0.2)
    with pytest.raises(ConfigError, match=f"in use by process {holder.pid} "), lock(path):
        pass
    holder.kill()
    with lock(path) as own:
        time.sleep(0.5)  # some signs of life of its own
        assert own.contended_at() < 0
    assert capsys.readouterr().err.count("has no locks") == 1
    assert not path.exists()


def test_of_two_at_once_without_locks_the_last_goes_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flock", "lockf"):
        monkeypatch.setattr(fcntl, name, without_locks)
    monkeypatch.setattr(time, "sleep", lambda seconds: write_holder(path))
    with pytest.raises(ConfigError, match="in use by process 7 on host elsewhere"), lock(path):
        pass


def test_a_lock_that_is_local_to_a_host_is_not_believed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks NFS mounted with `nolock`, where every host gets the lock."""
    monkeypatch.setattr(writer_lock, "SILENT_SECONDS", 0.5)
    write_holder(path)
    with beating(path), pytest.raises(ConfigError, match="in use by process 7 on host elsewhere"), lock(path):
        pass
    assert path.exists()
    with lock(path):  # that host has crashed
        pass


@pytest.mark.parametrize("kind", ["link", "fifo", "folder", "socket"])
def test_only_a_regular_file_is_locked(path: Path, kind: str) -> None:
    target = path.with_name("target")
    target.write_text("foreign")
    if kind == "link":
        path.symlink_to(target)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    before = file_state(path)
    with (
        pytest.raises(ConfigError, match=r"the lock .*run\.lock cannot be taken: it is not a regular file"),
        lock(path),
    ):
        pass
    assert file_state(path) == before and target.read_text() == "foreign"


def test_a_foreign_file_gets_one_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ConfigError, match=r"cannot be taken: Permission denied\. If no other process .*delete"):
        lock(path).__enter__()


def test_names_are_printable(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_holder(path, host="\x1b[31m\n" * 50, command="\u202e" * 3000, boot="elsewhere")
    with beating(path), pytest.raises(ConfigError) as refused, lock(path):
        pass
    assert str(refused.value).isprintable() and len(str(refused.value)) < 5000


@given(
    st.binary() | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(lambda v: json.dumps(v).encode())
)
@settings(max_examples=60)
def test_any_content_is_read(content: bytes) -> None:
    assert parse_holder(content) is None


def test_a_full_disk_costs_the_name_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks a lock on a full disk: only the holder's name is missing, and it is written once there is room."""
    write = os.pwrite

    def refuse(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", refuse)
    with lock(path):
        assert path.stat().st_size == 0
        other = subprocess.run(
            [sys.executable, "-m", "tests.lock_holder", str(path), ""], cwd=ROOT, text=True, stderr=subprocess.PIPE
        )
        assert "in use by another process, which has not written its name" in other.stderr
        monkeypatch.setattr(os, "pwrite", write)
        while not path.stat().st_size:
            time.sleep(0.05)
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_record_lock_that_is_lost_is_taken_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_lock, "_BEAT_SECONDS", 0.2)
    monkeypatch.setattr(fcntl, "flock", refuse_flock)
    with lock(path):
        path.read_text()  # closes the file a second time
        time.sleep(0.5)
        check = f"import fcntl; fcntl.lockf(open({str(path)!r}, 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB, 1)"
        assert b"BlockingIOError" in subprocess.run([sys.executable, "-c", check], stderr=subprocess.PIPE).stderr


def test_who_loses_the_lock_to_another_ends(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(writer_lock, "_BEAT_SECONDS", 0.2)
    ended: list[int] = []
    with lock(path, end=ended.append) as own, path.open() as other:
        fcntl.flock(own._file, fcntl.LOCK_UN)
        fcntl.flock(other, fcntl.LOCK_EX)
        write_holder(path)
        while not ended:
            time.sleep(0.05)
    assert ended[0] == 1
    assert path.exists()  # it is the other's now
    assert "error: the folder is now in use by process 7 on host elsewhere" in capsys.readouterr().err
