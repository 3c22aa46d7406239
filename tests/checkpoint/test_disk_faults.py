"""Tests a fault at every file operation of a save: a whole checkpoint remains, and the next save works.

The simulated crash loses operations that had not begun, like kill -9. It does not lose writes that the system has
accepted, as a power failure may, so a missing fsync is not found here.
"""

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from beit3_ds.parallel import Mesh
from tests.checkpoint.small_state import SmallRun, check_holds
from tests.ranks import run_ranks

OPERATIONS = ("open", "write", "fsync", "close", "mkdir", "replace", "unlink", "rmdir")
ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS)


class Crash(BaseException):
    """Simulates the end of the process; no code outside the tests handles it."""


@dataclass
class Fault:
    """Injects a fault into operation number `at` of the saving thread, and counts all operations."""

    kind: str
    at: int
    seen: list[tuple[str, Path]] = field(default_factory=list)
    """Name and path of each operation so far; for a descriptor, the path of the open file."""

    @property
    def names(self) -> list[str]:
        """Returns the names of the operations so far."""
        return [name for name, _ in self.seen]

    @property
    def code(self) -> int:
        """Returns the error number of the fault."""
        return ERRORS[self.at % len(ERRORS)] if self.kind == "error" else errno.EROFS

    def run(self, name: str, operation: Callable[..., Any], arguments: tuple[Any, ...], options: Any) -> Any:
        number = len(self.seen)
        path = Path(os.readlink(f"/proc/self/fd/{arguments[0]}") if isinstance(arguments[0], int) else arguments[0])
        self.seen.append((name, path))
        if self.kind == "error for good" and number >= self.at and name != "close":
            raise OSError(self.code, os.strerror(self.code))
        if number != self.at or (name == "close" and path.is_dir()):  # nothing of a folder is written by closing it
            return operation(*arguments, **options)
        if self.kind == "error":
            if name == "close":  # the descriptor is free all the same
                operation(*arguments)
            raise OSError(self.code, os.strerror(self.code))
        if self.kind in ("short write", "crash inside"):
            descriptor, content = arguments
            result = operation(descriptor, content[: len(content) // 2 + 1])
        else:
            result = operation(*arguments, **options)
        if self.kind.startswith("crash"):
            raise Crash
        return result


@pytest.fixture
def inject(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Fault], None]]:
    """Provides a function that injects a fault into saving threads; crashed threads print nothing."""
    current: list[Fault] = []

    def wrap(name: str) -> None:
        operation = getattr(os, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            if threading.current_thread().name != "checkpoint" or not current:
                return operation(*arguments, **options)
            return current[-1].run(name, operation, arguments, options)

        monkeypatch.setattr(os, name, wrapped)

    for name in OPERATIONS:
        wrap(name)
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    monkeypatch.setattr(os, "getpid", lambda: 100_000 + len(current))  # another process after each
    return current.append


def prepare(root: Path, keep: int, after_a_crash: bool) -> int:
    """Creates a folder with `keep` whole checkpoints; returns the step of the next checkpoint.

    With `after_a_crash`, the folder also holds what a crash may leave: unfinished and half-deleted folders, and a
    damaged checkpoint with the next step's name.
    """
    assert SmallRun(root, keep).save(*range(1, keep + 1)) == [None] * keep
    new = keep + 1
    if after_a_crash:
        assert SmallRun(root, new).save(new) == [None]
        damaged = root / step_name(new)
        (damaged / "index.json").write_text("{}")
        shutil.copytree(damaged, root / f".writing-{damaged.name}")
        shutil.copytree(damaged, root / ".deleted-step-00000000")
        (root / "latest").write_text(step_name(keep))
    return new


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def check_fault(root: Path, keep: int, new: int, fault: Fault, inject: Callable[[Fault], None]) -> str:
    """Saves step `new` with a fault, then checks the disk and another save; returns how the fault was reported.

    `latest` must name a whole checkpoint at any time: the newest, or the previous one while the newest is written.
    """
    run, before = SmallRun(root, keep), set(root.glob(".writing-*"))
    inject(fault)
    errors = run.save(new)
    inject(Fault("none", -1))
    if errors not in ([], [None]) and fault.kind == "error" and fault.names[fault.at] not in ("unlink", "rmdir"):
        assert set(root.glob(".writing-*")) <= before, "a save that failed has left its files on the full disk"
    found = SmallRun(root).resume()
    assert found in (new - 1, new)
    latest = (root / "latest").read_text().strip()
    assert latest in (step_name(new - 1), step_name(found))
    check_holds(root / latest, int(latest.removeprefix("step-")))
    if errors == [None]:
        outcome = "saved"
        assert (found, latest) == (new, step_name(new))
    elif errors:
        outcome = "reported"
        (error,) = errors
        assert error is not None and os.strerror(fault.code) in error and "(rank 0, " in error
    else:
        outcome = "crashed"
        run = SmallRun(root, keep)  # of the next process
    assert run.save(new + 1) == [None]
    assert SmallRun(root).resume() == new + 1
    kept = [new - 1, new, new + 1] if found == new else [new - 1, new + 1]
    left = {path.name for path in root.iterdir()} - {f"{step_name(new)}.replaced"}  # what a crash damaged is moved
    if found != new and keep > 1:  # a damaged one may lie between whole ones, until these are pruned
        left -= {step_name(new)}
    assert left == {"latest", *map(step_name, kept[-keep:])}
    return outcome


def faults(operations: Sequence[str]) -> Iterator[Fault]:
    for number, operation in enumerate(operations):
        yield Fault("error", number)
        yield Fault("error for good", number)
        yield Fault("crash after", number)
        if operation == "write":
            yield Fault("short write", number)
            yield Fault("crash inside", number)


@pytest.mark.usefixtures("lone_rank")
def test_all_is_synced_before_it_is_found(tmp_path: Path, inject: Callable[[Fault], None]) -> None:
    """Catches a wrong order of operations that only a power failure would reveal."""
    assert SmallRun(tmp_path / "root").save(1) == [None]
    run, fault = SmallRun(tmp_path / "root"), Fault("none", -1)
    inject(fault)
    assert run.save(2) == [None]
    aside, root = tmp_path / "root" / ".writing-step-00000002", tmp_path / "root"
    renamed = fault.seen.index(("replace", aside))
    files = [path for name, path in fault.seen if name == "open" and path.parent == aside]
    assert len(files) == 5
    for file in files:
        last = max(number for number, seen in enumerate(fault.seen) if seen == ("write", file))
        assert last < fault.seen.index(("fsync", file)) < fault.seen.index(("fsync", aside)) < renamed
    assert fault.seen.index(("fsync", root)) > renamed
    named = next(number for number, seen in enumerate(fault.seen) if seen[0] == "replace" and "latest" in seen[1].name)
    assert ("fsync", fault.seen[named][1]) in fault.seen[:named]
    assert ("fsync", root) in fault.seen[renamed:named]  # else the name of what is not there could last
    assert ("fsync", root) in fault.seen[named:]


@pytest.mark.usefixtures("lone_rank")
@pytest.mark.parametrize(("keep", "after_a_crash"), [(1, False), (2, True)])
def test_every_fault_leaves_a_whole_checkpoint(
    tmp_path: Path, inject: Callable[[Fault], None], keep: int, after_a_crash: bool
) -> None:
    before = tmp_path / "before"
    new = prepare(before, keep, after_a_crash)
    shutil.copytree(before, tmp_path / "undisturbed")
    undisturbed = Fault("none", -1)
    assert check_fault(tmp_path / "undisturbed", keep, new, undisturbed, inject) == "saved"
    assert set(undisturbed.names) == set(OPERATIONS), "what is not seen is not tested"

    outcomes: dict[str, set[str]] = {}
    for fault in faults(undisturbed.names):
        root = tmp_path / "root"
        shutil.copytree(before, root)
        try:
            outcome = check_fault(root, keep, new, fault, inject)
        except AssertionError as error:
            raise AssertionError(f"{fault.kind} at operation {fault.at}: {undisturbed.names[fault.at]}") from error
        shutil.rmtree(root)
        outcomes.setdefault(fault.kind, set()).add(outcome)
    assert outcomes == {
        "error": {"reported", "saved"},
        "error for good": {"reported", "saved"},
        "crash after": {"crashed", "saved"},
        "short write": {"saved"},
        "crash inside": {"crashed"},
    }


@pytest.mark.usefixtures("lone_rank")
def test_what_cannot_be_deleted_stops_no_save(tmp_path: Path) -> None:
    """Checks saving when an old checkpoint cannot be deleted, as on a network file system with open files.

    Here, a file takes the place of a folder, so `rmtree` refuses to delete it.
    """
    root = tmp_path / "root"
    root.mkdir()
    (root / ".deleted-step-00000000").touch()
    assert SmallRun(root).save(1, 2) == [None, None]


def save_with_a_full_disk(root: str, full_rank: int) -> list[str | None]:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    run = SmallRun(Path(root), mesh=Mesh(data_parallel_rank=rank, data_parallel_size=2))
    errors, write = run.save(1), os.write

    def fail(descriptor: int, content: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if rank == full_rank:
        os.write = fail
    errors += run.save(2)
    os.write = write
    assert run.resume() == 1
    errors += run.save(3)
    assert run.resume() == 3
    dist.destroy_process_group()
    return errors


@pytest.mark.parametrize("full_rank", [0, 1])
def test_all_ranks_hear_of_a_fault_on_one(tmp_path: Path, full_rank: int) -> None:
    first, second = run_ranks(save_with_a_full_disk, 2, str(tmp_path / "root"), full_rank)
    assert first == second
    assert first[0] is first[2] is None
    assert f"No space left on device (rank {full_rank}, stage 0, data-parallel rank {full_rank}" in first[1]
