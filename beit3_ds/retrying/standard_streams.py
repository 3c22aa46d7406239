"""Replaces stdout and stderr by streams that do not end a program when a write fails."""

import contextlib
import io
import logging
import os
import sys
from typing import Any, NamedTuple, TextIO

from beit3_ds.retrying.stream import RetryingStream


class StandardStreams(NamedTuple):
    """Holds the streams that replace `sys.stdout` and `sys.stderr`.

    A stream is None if the original is not a file, as in notebooks.
    """

    stdout: RetryingStream | None
    stderr: RetryingStream | None

    def finish(self) -> OSError | None:
        """Tries to write all unwritten output; returns the error if output of stdout remains unwritten.

        A pipe whose reader has ended is not an error, because programs like `head` end early on purpose.
        """
        for file in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                file.flush()
        for stream in self:
            if stream is not None:
                stream.finish()
        return self.stdout.error if self.stdout is not None and self.stdout.has_reader else None


def keep_standard_streams(*, reports_closed_pipe: bool = False) -> StandardStreams:
    """Replaces `sys.stdout` and `sys.stderr` by streams that do not end the program when a write fails.

    The new streams stay for the rest of the process, and existing log handlers use them too. If a stream cannot be
    written, as on a full disk, one warning appears on the other stream. A second call replaces nothing.

    Args:
        reports_closed_pipe: whether to report a pipe whose reader has ended. Programs like `head` end early on purpose.
    """
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        file = getattr(sys, name)
        if file is None:  # the program was started with the descriptor closed
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif type(file) is io.TextIOWrapper and not isinstance(_raw(file), RetryingStream) and _is_real(file):
            _replace(name, file, descriptor)
    streams = StandardStreams(_stream("stdout"), _stream("stderr"))
    for stream in streams:
        if stream is not None and reports_closed_pipe:
            stream.reports_closed_pipe = True
    return streams


def _replace(name: str, file: io.TextIOWrapper, descriptor: int) -> None:
    with contextlib.suppress(OSError):
        file.flush()
    other = "stderr" if name == "stdout" else "stdout"

    def report(error: OSError) -> None:
        # Writes below the other stream's buffer: another thread may hold the buffer's lock, and report an error of this
        # stream at the same time.
        stream = _stream(other)
        if stream is not None and stream.error is None:
            stream.write(_describe(name, error).encode())

    stream = RetryingStream(lambda: descriptor, report)
    buffer: Any = stream if file.write_through else io.BufferedWriter(stream)  # `python -u` has no buffer
    kept = io.TextIOWrapper(
        buffer,
        encoding=file.encoding,
        errors=file.errors,
        line_buffering=file.line_buffering,
        write_through=file.write_through,
    )
    setattr(sys, name, kept)
    for logger in (logging.getLogger(), *logging.root.manager.loggerDict.values()):
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and handler.stream is file:
                handler.stream = kept  # `setStream` would flush the old one, which may fail


def _describe(name: str, error: OSError) -> str:
    if isinstance(error, BrokenPipeError):
        return f"WARNING: nobody reads {name} any more; the program continues without it\n"
    return (
        f"WARNING: {name} cannot be written: {error.strerror}. The program continues and writes the missing lines once "
        "that is possible.\n"
    )


def _stream(name: str) -> RetryingStream | None:
    raw = _raw(getattr(sys, name))
    return raw if isinstance(raw, RetryingStream) else None


def _raw(file: TextIO | None) -> object:
    buffer = getattr(file, "buffer", None)
    return getattr(buffer, "raw", buffer)


def _is_real(file: TextIO) -> bool:
    try:
        return file.fileno() >= 0
    except (OSError, ValueError):
        return False
