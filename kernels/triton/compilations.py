"""Counts the kernels that Triton found in its cache, and the kernels that it compiled, in this process."""

import importlib.util
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any


class Compilations:
    """Counts the kernels that Triton loads or compiles in this process."""

    def __init__(self, report: Callable[[str, float], None] = lambda name, seconds: None) -> None:
        """Sets all counts to 0.

        Args:
            report: function that is called after each compilation, with the kernel's name and the compilation time in
                seconds.
        """
        self._report = report
        self.num_hits = 0
        """Number of kernels that were found in Triton's cache."""
        self.missed: Counter[str] = Counter()
        """Number of kernels that were not found in Triton's cache and had to be compiled, by kernel name."""
        self.seconds = 0.0
        """Total time of all compilations in seconds."""

    def start(self) -> None:
        """Starts counting. Does nothing if PyTorch is not imported or Triton is not installed."""
        if "torch" in sys.modules and importlib.util.find_spec("triton") is not None:
            import triton  # absent from torch's builds for CPUs

            triton.knobs.compilation.listener = self._count

    @property
    def num_misses(self) -> int:
        """Returns the number of kernels that were not found in Triton's cache and had to be compiled."""
        return sum(self.missed.values())

    def describe(self) -> dict[str, Any]:
        """Returns the counts as a dict, for logging."""
        missed = ", ".join(f"{name} {number}" for name, number in self.missed.most_common())
        return {"hits": self.num_hits, "misses": self.num_misses, "compile_seconds": self.seconds, "missed": missed}

    def _count(self, *, src: Any, metadata: Any, metadata_group: Any, times: Any, cache_hit: bool) -> None:
        if cache_hit:
            self.num_hits += 1
            return
        name, seconds = getattr(src, "name", "unknown"), times.total / 1e6
        self.missed[name] += 1
        self.seconds += seconds
        self._report(name, seconds)
