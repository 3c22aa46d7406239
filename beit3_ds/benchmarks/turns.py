"""Runs the implementations of a comparison (the sides) as processes that compute one at a time, in turn.

A process reads the number of a batch from each line of its standard input, and answers with a line of JSON on a pipe of
its own, because libraries print to standard output.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self, TextIO

import torch

from beit3_ds.benchmarks.peak_memory import peak_bytes

Turn = tuple[Callable[[], float], dict[str, Any]]
"""Function to time, which returns the loss or another number, and facts about its batch, by name."""


class TurnProcess:
    """Controls a process that computes one turn per request, with the same number of threads as this process."""

    def __init__(self, side: str, module: str, arguments: Sequence[str]) -> None:
        """Starts the process, which writes its answers into a pipe.

        Args:
            side: name of the side, for messages.
            module: module to run, which calls `serve_turns`.
            arguments: first arguments of the module; the pipe's file descriptor follows them.
        """
        self.side = side
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `stop`
        reading, writing = os.pipe()
        environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments, str(writing)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=self.log,
            pass_fds=[writing],
            text=True,
        )
        os.close(writing)
        self.answers = os.fdopen(reading)

    def take_turn(self, number: int) -> dict[str, Any]:
        """Lets the process compute batch `number` and returns its figures.

        Raises:
            RuntimeError: if the process ended; the message has its last output.
        """
        assert self.process.stdin is not None
        try:
            print(number, file=self.process.stdin, flush=True)
            answer = self.answers.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.process.wait()
            self.log.seek(0)
            log = self.log.read().decode(errors="replace")
            raise RuntimeError(f"{self.side} ended with status {self.process.returncode}:\n{log[-2000:]}")
        figures: dict[str, Any] = json.loads(answer)
        return figures

    def stop(self) -> None:
        """Kills the process and closes its pipes."""
        self.process.kill()
        self.process.communicate()
        self.answers.close()
        self.log.close()

    def __enter__(self) -> Self:
        """Returns this object; `__exit__` stops its process."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stops the process."""
        self.stop()


def serve_turns(prepare: Callable[[int], Turn], orders: Iterable[str], answers: TextIO) -> None:
    """Computes one turn for every batch number that it reads, and answers with the turn's figures.

    `seconds` is wall time, and `cpu_seconds` is the CPU time of all threads. `page_faults` counts page faults that read
    nothing from a disk. `peak_bytes` is the peak memory since the start, of the process or of torch's allocator on a
    GPU.

    Args:
        prepare: builds a batch, outside the measured time, and returns its turn.
        orders: lines with the number of a batch, one per turn.
        answers: receives the figures, one line of JSON per turn.
    """
    for order in orders:
        turn, facts = prepare(int(order))
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        start, cpu_start = time.perf_counter(), time.process_time()
        loss = turn()
        _synchronize()
        figures = {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu_start,
            "page_faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults,
            "loss": loss,
            "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_bytes(),
        }
        print(json.dumps(figures | facts), file=answers, flush=True)


def device_of_turns() -> torch.device:
    """Returns the GPU if there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
