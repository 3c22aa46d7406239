"""Runs a launch with a fake launcher and fake trainers in a separate process, and finds and ends its processes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.run_config import small_run_mapping

STEPS = 30
BOUND_SECONDS = 60


class Launch:
    """Runs a launch in a folder, as a separate process."""

    def __init__(self, folder: Path, hosts: str, faults: list[Any], steps: int = STEPS, **options: Any) -> None:
        self.output_dir = folder / "run"
        mapping = small_run_mapping(0, samples=(12, 12, 12))
        mapping["beit3_ds"]["training"] |= {"output_dir": str(self.output_dir), "total_steps": steps, "warmup_steps": 1}
        (folder / "config.json").write_text(json.dumps(mapping))
        (folder / "hosts").write_text(hosts)
        options = {"hostfile": str(folder / "hosts"), "config": str(folder / "config.json"), **options}
        options["environment"] = [f"FAULTS={json.dumps(faults)}", *options.get("environment", [])]
        self._printed = folder / "printed"
        with self._printed.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.cluster.launch.fake_launch", json.dumps(options)],
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.getcwd()},  # launchers start in another folder
            )

    def printed(self) -> str:
        return self._printed.read_text()

    def log(self, rank: int, attempt: int = 1) -> str:
        path = self.output_dir / "logs" / f"attempt_{attempt}" / f"rank_{rank}.log"
        return path.read_text() if path.exists() else ""

    def pid(self, pattern: str) -> int:
        """Returns the id of the only descendant whose command line matches a regular expression."""
        (pid,) = (pid for pid, line in self.descendants().items() if re.search(pattern, line))
        return pid

    def descendants(self) -> dict[int, str]:
        """Returns the command lines of all processes of this launch, by process id.

        Their command lines contain the output folder or the log.
        """
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                environment = (path / "environ").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if str(self.output_dir.parent) in f"{line} {environment}" and int(path.name) != self.process.pid:
                found[int(path.name)] = line
        return found

    def wait(self, but: str = "$none") -> int:
        """Waits for the end of the launch; fails if a process is left behind.

        Args:
            but: regular expression for command lines that may be left. If a guard is killed, real workers end with
                their rank, but fake ones do not.
        """
        status = self.process.wait(BOUND_SECONDS)
        self.wait_until(lambda: all(re.search(but, line) for line in self.descendants().values()), alive=False)
        return status

    def wait_until(self, happened: Callable[[], Any], alive: bool = True) -> None:
        deadline = time.monotonic() + BOUND_SECONDS
        while not happened():
            assert time.monotonic() < deadline, (self.printed(), self.descendants())
            assert not alive or self.process.poll() is None, self.printed()
            time.sleep(0.01)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in self.descendants():
            os.kill(pid, signal.SIGKILL)
