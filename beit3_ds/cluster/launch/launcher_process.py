"""Runs DeepSpeed's launcher as a child of the supervisor."""

import asyncio
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from beit3_ds.cluster.launch.process_tree import ProcessTree

_POLL_SECONDS = 0.1
_WATCH_SECONDS = 5.0


class LauncherProcess:
    """Runs the launcher's commands in separate sessions, so that Ctrl-C does not interrupt them."""

    def __init__(self, commands: Sequence[Sequence[str]], environment: Mapping[str, str], folder: Path, log: Path):
        """Starts the commands.

        Args:
            commands: commands that together start the guards of all ranks.
            environment: complete environment of the commands.
            folder: working directory of the commands.
            log: file to which the output of the commands is appended.

        Raises:
            OSError: if a command does not exist.
        """
        self.log = log
        self._processes: list[subprocess.Popen[bytes]] = []
        with log.open("ab") as file:
            for command in commands:
                self._processes.append(
                    subprocess.Popen(
                        command,
                        env=environment,
                        cwd=folder,
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        self._tree = ProcessTree([process.pid for process in self._processes])
        self._watched_at = time.monotonic()

    def watch(self) -> None:
        """Records, every few seconds, the processes that the commands have started on this machine."""
        if time.monotonic() - self._watched_at > _WATCH_SECONDS:
            self._tree.watch()
            self._watched_at = time.monotonic()

    def statuses(self) -> list[int] | None:
        """Returns the exit status of each launch command; None until all commands have ended."""
        statuses = [process.poll() for process in self._processes]
        return None if None in statuses else [status for status in statuses if status is not None]

    async def end(self, seconds: float) -> list[int]:
        """Waits at most `seconds` for all commands to end, then kills their remaining processes on this machine.

        Returns:
            Process ids of the killed processes.
        """
        deadline = asyncio.get_running_loop().time() + seconds
        while self.statuses() is None and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(_POLL_SECONDS)
        killed = self._tree.kill()
        for process in self._processes:
            process.wait()
        return killed
