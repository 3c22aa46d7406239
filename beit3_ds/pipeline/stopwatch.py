"""Measures the time that this rank spends on its own work. Waiting for other ranks does not count."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Accumulates the time of several pieces of work on the host or on a GPU.

    GPU time is measured with events. Only `take` synchronizes the device.
    """

    def __init__(self, device: torch.device) -> None:
        """Starts at zero seconds.

        Args:
            device: device that does the measured work.
        """
        self._is_on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Adds the time of the `with` block to the total."""
        if self._is_on_gpu:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            begin = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - begin

    def take(self) -> float:
        """Returns the accumulated seconds and resets them to zero. On a GPU, waits until the measured work is done."""
        for start, end in self._events:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        taken, self._seconds = self._seconds, 0.0
        self._events.clear()
        return taken
