"""Runs readers on hostile files; each file must give one printable message, in bounded time and memory."""

import collections
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from beit3_ds.config import ConfigError
from beit3_ds.data.files.records import BrokenRecordError

SECONDS, MEGABYTES = 5.0, 300
_LONGEST_MESSAGE = 10_000


class HostileKind(NamedTuple):
    """Describes a kind of hostile files and the reader for them."""

    write: Callable[[Path, random.Random], Path]
    """Writes one hostile file into an empty folder; returns the argument for the reader."""
    read: Callable[[Path], object]
    """Reads everything that a file holds; may raise the errors that commands print as one line."""


class HangError(BaseException):
    """Reports a reader that took too long; not an Exception, because decoders catch exceptions."""


class Figures(NamedTuple):
    """Holds time and memory that a kind of hostile files took."""

    files: int
    refused: int
    seconds: float
    """Longest processor time of one file, which does not depend on other programs."""
    megabytes: float
    """Largest increase of memory during one file."""


def check_kind(name: str, kind: HostileKind, folder: Path, numbers: Iterable[int]) -> Figures:
    """Reads the files with the given numbers, and checks their errors, times and memory."""
    outcomes: collections.Counter[bool] = collections.Counter()
    seconds = megabytes = 0.0
    for number in numbers:
        place = folder / f"{name}-{number}"
        place.mkdir(parents=True)
        path = kind.write(place, random.Random(f"{name} {number}"))
        before, began = _start_peak(), time.process_time()
        outcomes[_is_refused(kind, path, f"{name} {number}")] += 1
        seconds = max(seconds, time.process_time() - began)
        megabytes = max(megabytes, _status("VmHWM") - before)
        assert seconds < SECONDS, f"{name} {number}: {seconds:.1f} s"
        assert megabytes < MEGABYTES, f"{name} {number}: {megabytes:.0f} MB"
        shutil.rmtree(place)
    return Figures(outcomes.total(), outcomes[True], seconds, megabytes)


def show_figures(found: Mapping[str, Figures]) -> str:
    """Returns the figures as a table, for `pytest -s`."""
    rows = [
        f"{name:<28} {f.files:>6} {f.refused:>7} {f.seconds:>7.2f} {f.megabytes:>6.0f}" for name, f in found.items()
    ]
    total = f"all{'':<25} {sum(f.files for f in found.values()):>6}"
    return "\n".join(["", f"{'kind':<28} {'files':>6} {'refused':>7} {'s':>7} {'MB':>6}", *rows, total])


def _is_refused(kind: HostileKind, path: Path, what: str) -> bool:
    try:
        with _time_limit():
            kind.read(path)
    except ConfigError as error:
        check_message(str(error), what)
        return True
    except HangError:
        raise AssertionError(f"{what}: more than {SECONDS} s") from None
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {str(error)[:500]}") from error
    return False


def check_message(message: str, what: str) -> None:
    """Checks that a message is printable and short, and that further lines of it are indented."""
    first, *rest = message.split("\n")
    assert all(line.isprintable() for line in (first, *rest)), f"{what}: {message!r}"
    assert all(line.startswith("  ") for line in rest), f"{what}: {message!r}"
    assert len(first) < _LONGEST_MESSAGE, what
    assert first.strip(), what


def read_records(count: int, *readers: Callable[[int], object]) -> None:
    """Reads all records of a source; an error of a broken record must have a printable message."""
    for index in range(min(count, 50)):
        for read in readers:
            try:
                read(index)
            except BrokenRecordError as error:
                check_message(str(error), "record")


@contextmanager
def _time_limit() -> Iterator[None]:
    def stop(signum: int, frame: FrameType | None) -> None:
        raise HangError

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 2 * SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _start_peak() -> float:
    """Resets the peak memory of this process; returns the current memory in MB."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _status("VmRSS")


def _status(field: str) -> float:
    with open(f"/proc/{os.getpid()}/status") as file:
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) / 1024
