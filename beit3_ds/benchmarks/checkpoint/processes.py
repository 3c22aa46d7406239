"""Starts the processes of the checkpoint benchmark and collects the results of all ranks."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from beit3_ds.cores import count_cores

POLL_SECONDS = 0.01
"""Seconds between two checks of a running process."""


def start_module(log: Path, environment: Mapping[str, str], module: str, *arguments: str) -> "subprocess.Popen[bytes]":
    """Starts a module in a new process, like `python -m`, and writes the process's output to the file `log`."""
    with log.open("wb") as file:
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.Popen(command, env=dict(environment), stdout=file, stderr=subprocess.STDOUT)


def run_ranks(folder: Path, operation: str, size: str, rounds: int, ranks: int) -> list[dict[str, Any]]:
    """Runs an operation of `ranks.main` in one new process per rank, and returns the result of each rank.

    Raises:
        RuntimeError: if a rank fails; the message contains the end of the rank's output.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    threads = max(1, count_cores() // ranks)
    processes, results = [], [folder / f"{operation}-{rank}.json" for rank in range(ranks)]
    for rank, result in enumerate(results):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": str(threads)}
        arguments = ("beit3_ds.benchmarks.checkpoint.ranks", operation, str(folder), size, str(rounds), str(result))
        processes.append(start_module(result.with_suffix(".log"), os.environ | shared | own, *arguments))
    try:
        # Wait until all ranks end or one fails. After a failure, the other ranks would wait forever.
        while any(process.poll() is None for process in processes) and not any(process.poll() for process in processes):
            time.sleep(POLL_SECONDS)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, result in zip(processes, results, strict=True):
        if not result.exists():
            log = result.with_suffix(".log").read_text(errors="replace")
            raise RuntimeError(
                f"bench checkpoint: a rank failed ({operation}, status {process.returncode}):\n{log[-2000:]}"
            )
    return [json.loads(result.read_text()) for result in results]
