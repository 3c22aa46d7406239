"""Runs one rank's training process as a child process, and kills processes that the training leaves behind."""

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
from beit3_ds.cluster.launch.terminal import open_log
from beit3_ds.retrying.stream import RetryingStream

_LAST_LINES = 20
_LONGEST_LINE = 500  # maximum characters of each of the last lines
_CHUNK_BYTES = 1 << 16
_DRAIN_SECONDS = 5.0  # time for output that is still in the pipe when its writers are gone
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h
_libc = ctypes.CDLL(None)


class TrainerProcess:
    """Runs a trainer, one rank's training process, in a separate session, and logs the trainer's output.

    If the disk is full, training continues and the missing lines are written later. If the trainer's parent process
    ends, the kernel kills the trainer.
    """

    def __init__(
        self, start: Start, on_output: Callable[[str], None] | None, on_log_error: Callable[[str], None]
    ) -> None:
        """Starts the trainer. Must be called in the main thread.

        Linux kills the trainer when this thread ends.

        Args:
            start: command and environment of the trainer.
            on_output: receives the trainer's output, in another thread; None if nobody needs the output.
            on_log_error: receives the first error of writing the log, in another thread.

        Raises:
            OSError: if the trainer cannot start.
        """
        guard = os.getpid()

        def prepare() -> None:  # runs between fork and exec
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != guard:
                os._exit(1)

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
        """File descriptor that becomes readable when the trainer ends."""
        self._lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._unfinished = ""
        self._on_output, self._on_log_error = on_output, on_log_error
        # In a thread, because a network file system that hangs must not delay the guard's keepalive messages.
        self._copier = threading.Thread(target=self._copy_output, args=(Path(start.log),), daemon=True)
        self._copier.start()

    def state(self) -> str:
        """Returns the trainer's state as a letter from /proc; empty if the trainer has ended."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return ""

    def send_signal(self, number: int) -> None:
        """Sends a signal to the trainer but not to its data-loader workers."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def kill(self) -> None:
        """Kills all processes of the trainer's process group, including stopped ones. Not allowed after `finish`."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def finish(self) -> int:
        """Kills processes that an ended trainer left behind.

        Returns:
            The trainer's exit status, or minus the number of the signal that killed the trainer.
        """
        self.kill()  # before its number can be given to another process
        status = self._process.wait()
        os.close(self.pidfd)
        self._copier.join(_DRAIN_SECONDS)
        return status

    def last_lines(self) -> list[str]:
        """Returns the last lines that the trainer printed, at most 20."""
        return [*self._lines, *([self._unfinished] if self._unfinished else [])][-_LAST_LINES:]

    def _copy_output(self, log: Path) -> None:
        assert self._process.stdout is not None, "the output goes through a pipe"
        pipe = self._process.stdout.fileno()
        file = RetryingStream(lambda: open_log(log), lambda error: self._on_log_error(f"{log}: {error.strerror}"))
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while chunk := os.read(pipe, _CHUNK_BYTES):
            file.write(chunk)
            text = decoder.decode(chunk)
            self._remember(text)
            if self._on_output is not None:
                self._on_output(text)
        file.finish()
        file.release()

    def _remember(self, text: str) -> None:
        *lines, self._unfinished = (self._unfinished + text).split("\n")
        self._unfinished = self._unfinished[-_LONGEST_LINE:]
        self._lines.extend(line.rpartition("\r")[2][:_LONGEST_LINE] for line in lines)
