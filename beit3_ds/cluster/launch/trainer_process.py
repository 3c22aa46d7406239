"""One rank's trainer as a child of its guard: its output, its state, and an end that leaves nothing behind."""

import codecs
import contextlib
import ctypes
import os
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

from beit3_ds.cluster.launch.messages import Start
from beit3_ds.runtime.stop_signals import STOP_SIGNALS

_LAST_LINES = 20
_LONGEST_LINE = 500  # characters of one of them
_CHUNK_BYTES = 1 << 16
_DRAIN_SECONDS = 5.0  # for output that is still in the pipe when its writers are gone
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_libc = ctypes.CDLL(None)


class TrainerProcess:
    """A trainer in a session of its own.

    Its output goes through a pipe, so that a full disk costs lines of the log and not the run. It dies with its guard,
    whatever ends that.
    """

    def __init__(
        self, start: Start, on_output: Callable[[str], None] | None, on_log_trouble: Callable[[str], None]
    ) -> None:
        """Starts it; call this from the main thread, whose end is that of the trainer.

        Args:
            start: what to start, and where.
            on_output: is handed what the trainer prints, by another thread.
            on_log_trouble: is told once, by another thread, if the log cannot be written.

        Raises:
            OSError: if it cannot be started.
        """
        guard = os.getpid()

        def prepare() -> None:  # between fork and exec
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != guard:
                os._exit(1)
            # Until the trainer can take them it would die of them: they wait for it (`runtime.stop_signals`).
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

        self._process = subprocess.Popen(
            start.command,
            env={**os.environ, **start.environment},
            cwd=start.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=prepare,
        )
        self.pid = self._process.pid
        self.pidfd = os.pidfd_open(self.pid)
        """Readable once the trainer has ended."""
        self._lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._unfinished = ""
        self._on_output, self._on_log_trouble = on_output, on_log_trouble
        # A thread: a network file system that hangs must not keep the guard from its heartbeats.
        self._copier = threading.Thread(target=self._copy_output, args=(Path(start.log),), daemon=True)
        self._copier.start()

    def state(self) -> str:
        """Letter of its state in /proc; empty if it is gone."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return ""

    def send_signal(self, number: int) -> None:
        """Sends a signal to the trainer; its data-loader workers are left alone."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def kill(self) -> None:
        """Kills the trainer and all processes of its session, stopped ones too. Not after `finish`."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def finish(self) -> int:
        """Ends what the trainer has left behind, once it has ended; returns its status, or minus its signal."""
        self.kill()  # before its number can be given to others
        status = self._process.wait()
        os.close(self.pidfd)
        self._copier.join(_DRAIN_SECONDS)
        return status

    def last_lines(self) -> list[str]:
        """The last lines that it has printed, twenty at most."""
        return [*self._lines, *([self._unfinished] if self._unfinished else [])][-_LAST_LINES:]

    def _copy_output(self, log: Path) -> None:
        assert self._process.stdout is not None, "the output goes through a pipe"
        pipe = self._process.stdout.fileno()
        try:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            file = -1
            self._on_log_trouble(f"{log}: {error.strerror}")
        is_told, decoder = file < 0, codecs.getincrementaldecoder("utf-8")("replace")
        while chunk := os.read(pipe, _CHUNK_BYTES):
            try:
                if file >= 0:
                    _write_all(file, chunk)
            except OSError as error:
                if not is_told:
                    self._on_log_trouble(f"{log}: {error.strerror}")
                is_told = True
            text = decoder.decode(chunk)
            self._remember(text)
            if self._on_output is not None:
                self._on_output(text)
        if file >= 0:
            with contextlib.suppress(OSError):
                os.close(file)

    def _remember(self, text: str) -> None:
        *lines, self._unfinished = (self._unfinished + text).split("\n")
        self._unfinished = self._unfinished[-_LONGEST_LINE:]
        self._lines.extend(line.rpartition("\r")[2][:_LONGEST_LINE] for line in lines)


def _write_all(file: int, chunk: bytes) -> None:
    while chunk:
        chunk = chunk[os.write(file, chunk) :]
