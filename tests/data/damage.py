"""Damages files at random from a seed, and limits the time of readers."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

import numpy as np
import pytest

SECONDS = 10.0  # for one case, on a slow and busy machine; a usual one takes a few milliseconds

FAST_CASES, SLOW_CASES = range(250), range(250, 20_000)
fast_and_slow = pytest.mark.parametrize(
    "cases", [FAST_CASES, pytest.param(SLOW_CASES, marks=pytest.mark.slow)], ids=["fast", "slow"]
)


class Hang(BaseException):
    """Reports code that took too long; not an Exception, because decoders and readers may catch exceptions."""


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Raises Hang in code that takes longer than `SECONDS`."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Hang(f"more than {SECONDS} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


# Damage. Each kind takes bytes and gives bytes; all but `truncate` keep the length.


def flip(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    # Half of the time near the beginning, where the headers are.
    end = len(data) if rng.random() < 0.5 else min(len(data), 100)
    for position in rng.integers(0, end, rng.integers(1, 9)):
        changed[position] ^= int(rng.integers(1, 256))
    return bytes(changed)


def truncate(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: rng.integers(0, len(data))]


def overwrite_number(data: bytes, rng: np.random.Generator) -> bytes:
    """Writes an extreme number at a random place, in either byte order, like a wrong size field."""
    value = int(rng.choice([0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000, 0x01000000]))
    number = value.to_bytes(4, "big" if rng.random() < 0.5 else "little")
    return paste(data, number, int(rng.integers(0, max(1, min(len(data), 400) - 4))))


def splice_within(data: bytes, rng: np.random.Generator) -> bytes:
    start, length = int(rng.integers(0, len(data))), int(rng.integers(1, 200))
    return paste(data, data[start : start + length], int(rng.integers(0, len(data))))


def paste(data: bytes, piece: bytes, position: int) -> bytes:
    return (data[:position] + piece + data[position + len(piece) :])[: len(data)]


GENERAL_DAMAGE = (flip, truncate, overwrite_number, splice_within)


def lie_about_size(data: bytes, rng: np.random.Generator) -> bytes:
    """Changes the size in a tar header and corrects the checksum."""
    position = int(rng.choice(_header_positions(data)))
    header = bytearray(data[position : position + 512])
    sizes = [0, 1, 511, 512, 1024, 1536, 2048, len(data), 0o77777777777]
    header[124:136] = b"%011o\0" % int(rng.choice(sizes))
    if rng.random() < 0.1:
        header[124:136] = bytes([int(rng.choice([0x80, 0xFF]))]) + rng.bytes(11)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return paste(data, bytes(header), position)


def splice_header(data: bytes, rng: np.random.Generator) -> bytes:
    """Writes a valid tar header over another block."""
    position = int(rng.choice(_header_positions(data)))
    return paste(data, data[position : position + 512], 512 * int(rng.integers(0, 1 + len(data) // 512)))


TAR_DAMAGE = (flip, truncate, splice_within, lie_about_size, splice_header)


def _header_positions(data: bytes) -> list[int]:
    blocks = range(0, len(data) - 511, 512)
    return [i for i in blocks if data[i + 257 : i + 262] == b"ustar"] or [0]
