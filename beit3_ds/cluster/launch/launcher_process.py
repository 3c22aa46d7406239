"""Runs DeepSpeed's launcher as a child process of `beit3 launch`."""

import asyncio
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from beit3_ds.cluster.launch.process_tree import ProcessTree
from beit3_ds.cluster.launch.terminal import open_log
from beit3_ds.retrying.stream import RetryingStream

_POLL_SECONDS = 0.1
_CHUNK_BYTES = 1 << 16
_WATCH_SECONDS = 5.0


class LauncherProcess:
    """Runs the commands of DeepSpeed's launcher in separate sessions, so that Ctrl-C does not interrupt the commands.

    Output goes first to a file in memory and then to the log. So neither a full disk nor the end of `beit3 launch`
    stops the commands.
    """

    def __init__(self, commands: Sequence[Sequence[str]], environment: Mapping[str, str], folder: Path, log: Path):
        """Starts the launcher's commands.

        Args:
            commands: commands that together start the guards of all ranks. A guard is the parent of a training process.
            environment: complete environment of the commands.
            folder: working directory of the commands.
            log: file for the commands' output. Each call of a method of this class appends the output that has arrived.

        Raises:
            OSError: if a command does not exist.
        """
        self.log = log
        self._processes: list[subprocess.Popen[bytes]] = []
        self._output, self._num_copied = open(os.memfd_create("launcher"), "rb", buffering=0), 0  # noqa: SIM115
        self._log = RetryingStream(lambda: open_log(log), lambda error: None)
        for command in commands:
            self._processes.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=self._output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
        self._tree = ProcessTree([process.pid for process in self._processes])
        self._watched_at = time.monotonic()

    def watch(self) -> None:
        """Records the processes that the launcher's commands have started on this machine, at most once every five
        seconds.

        Each call also appends the commands' new output to the log.
        """
        self._copy_output()
        if time.monotonic() - self._watched_at > _WATCH_SECONDS:
            self._tree.watch()
            self._watched_at = time.monotonic()

    def statuses(self) -> list[int] | None:
        """Returns the exit status of each command, or None while a command still runs."""
        statuses = [process.poll() for process in self._processes]
        self._copy_output()
        return None if None in statuses else [status for status in statuses if status is not None]

    async def end(self, seconds: float) -> list[int]:
        """Waits until all of the launcher's commands have ended, but not longer than `seconds`. Then kills all
        processes of the commands that still run on this machine.

        Returns:
            Ids of the killed processes.
        """
        deadline = asyncio.get_running_loop().time() + seconds
        while self.statuses() is None and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(_POLL_SECONDS)
        killed = self._tree.kill()
        for process in self._processes:
            process.wait()
        self._copy_output()
        self._log.release()
        return killed

    def _copy_output(self) -> None:
        while chunk := os.pread(self._output.fileno(), _CHUNK_BYTES, self._num_copied):
            self._log.write(chunk)
            self._num_copied += len(chunk)
