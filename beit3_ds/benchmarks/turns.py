"""Compares implementations (*sides*) in turn. Each side has its own process, and only one process computes at a time.

A process reads one batch number per line from standard input. It answers with one line of JSON per batch on a separate
pipe, because libraries print to standard output.
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
"""Function to time, and a dict of facts about the function's batch. The function returns a number such as the loss."""


class TurnProcess:
    """Controls the process of one side. A side is one of the compared implementations.

    Each call of `take_turn` makes the process compute one batch. The controlled process uses as many threads as the
    process that starts it.
    """

    def __init__(self, side: str, module: str, arguments: Sequence[str]) -> None:
        """Starts the process of one implementation, called a side, and opens a pipe for the measured figures.

        Args:
            side: name of the implementation, for messages.
            module: module to run, which calls `serve_turns`.
            arguments: arguments of the module. The file descriptor of the pipe is appended as the last argument.
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
        """Requests one turn with batch `number`, and returns the measured figures.

        Raises:
            RuntimeError: if the process has ended; the message contains the last output of the process.
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
        """Kills the process and closes the pipes."""
        self.process.kill()
        self.process.communicate()
        self.answers.close()
        self.log.close()

    def __enter__(self) -> Self:
        """Returns this object. At the end of the block, the process is stopped."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stops the process."""
        self.stop()


def serve_turns(prepare: Callable[[int], Turn], orders: Iterable[str], answers: TextIO) -> None:
    """Computes one turn for each batch number in `orders`, and writes the measured figures to `answers`.

    Figures: `seconds` is wall time. `cpu_seconds` is the CPU time of all threads. `page_faults` counts page faults
    without a disk read. `loss` is the number that the timed function returned. `peak_bytes` is the peak memory since
    this process started: on a GPU, of torch's allocator; on a CPU, of the process. The facts that `prepare` returned
    are written after these figures.

    Args:
        prepare: builds a batch outside the measured time. Returns a tuple: the function to time, and facts about the
            batch.
        orders: lines with one batch number each.
        answers: open text file for the figures, one line of JSON per turn.
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
    """Returns the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
