"""DeepSpeed's launcher as a child of the supervisor."""

import asyncio
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from beit3_ds.cluster.launch.process_tree import ProcessTree

_POLL_SECONDS = 0.1
_WATCH_SECONDS = 5.0


class LauncherProcess:
    """One command, or one for each host, each in a session of its own: Ctrl-C in a terminal does not reach it."""

    def __init__(self, commands: Sequence[Sequence[str]], environment: Mapping[str, str], folder: Path, log: Path):
        """Starts the commands.

        Args:
            commands: all of which it takes to start the guards.
            environment: of the commands, whole.
            folder: to run in.
            log: for what they print.

        Raises:
            OSError: if one of them is not there.
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
        """Takes note, every few seconds, of the processes that it has started on this machine."""
        if time.monotonic() - self._watched_at > _WATCH_SECONDS:
            self._tree.watch()
            self._watched_at = time.monotonic()

    def statuses(self) -> list[int] | None:
        """Exit statuses, once all commands have ended."""
        statuses = [process.poll() for process in self._processes]
        return None if None in statuses else [status for status in statuses if status is not None]

    async def end(self, seconds: float) -> list[int]:
        """Waits for all commands to end, and kills what they have left on this machine after that time.

        Returns:
            The numbers of the processes that had to be killed.
        """
        deadline = asyncio.get_running_loop().time() + seconds
        while self.statuses() is None and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(_POLL_SECONDS)
        killed = self._tree.kill()
        for process in self._processes:
            process.wait()
        return killed
