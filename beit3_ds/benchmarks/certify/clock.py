"""Times calls on a GPU, without the time that Python needs to launch kernels.

Other work is queued on the GPU before each call, so that the GPU is busy until Python has launched the call.
"""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from beit3_ds.benchmarks.certify.device_kind import kind_of

_WIDTHS = {"cuda": 8192, "dry": 64}
_MOST_PRODUCTS = 40


class Timing(NamedTuple):
    """Holds the measured times of repeated calls."""

    milliseconds: list[float]
    """Milliseconds on the device for each call."""
    host_milliseconds: float
    """Median milliseconds that Python needs to launch one call's kernels. On a CPU, the median milliseconds of one
    call."""

    @property
    def median(self) -> float:
        """Returns the median time in milliseconds per call."""
        return statistics.median(self.milliseconds)

    def describe(self) -> dict[str, float]:
        """Returns four times by name: a call's median, minimum and maximum device time, and the host's time
        (`host_milliseconds`).

        All times are in milliseconds.
        """
        low, high = min(self.milliseconds), max(self.milliseconds)
        return {"ms": self.median, "min_ms": low, "max_ms": high, "host_ms": self.host_milliseconds}


class Clock:
    """Times calls on one device.

    On a GPU, large matrix products run before each timed call. The products keep the GPU busy until Python has launched
    the call, keep the GPU's clock rate high, and replace the content of the L2 cache.
    """

    def __init__(self, device: torch.device) -> None:
        """Prepares and times the matrix product that keeps the GPU busy before each timed call."""
        self.device, self.kind = device, kind_of(device)
        if self.kind != "cpu":
            width = _WIDTHS[self.kind]
            self._operands = [torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(3)]
            self._queue(100)  # raises the GPU's clock rate
            self._product_ms = self._events(lambda: self._queue(10)) / 10

    def time(self, call: Callable[[Any], Any], rounds: int, prepare: Callable[[], Any] = lambda: None) -> Timing:
        """Times `call(prepare())`, after a few calls for warming up. The time of `prepare` is not included.

        Args:
            call: function to time. The result is discarded.
            rounds: number of timed calls.
            prepare: function that returns the argument for each call.
        """
        host = [self._host_ms(call, prepare()) for _ in range(3)][1:]
        if self.kind == "cpu":
            return Timing(times := [self._host_ms(call, prepare()) for _ in range(rounds)], statistics.median(times))
        torch.cuda.synchronize()
        products = min(_MOST_PRODUCTS, 1 + math.ceil(2 * min(host) / self._product_ms))
        times = []
        for _ in range(rounds):
            argument = prepare()
            self._queue(products)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            begin = time.perf_counter()
            result = call(argument)
            host.append((time.perf_counter() - begin) * 1e3)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
            del argument, result
        return Timing(times, statistics.median(host[2:]))

    def _queue(self, number: int) -> None:
        a, b, out = self._operands
        for _ in range(number):
            torch.mm(a, b, out=out)

    def _events(self, call: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def _host_ms(self, call: Callable[[Any], Any], argument: Any) -> float:
        start = time.perf_counter()
        call(argument)
        return (time.perf_counter() - start) * 1e3
