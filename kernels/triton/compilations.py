"""Counts how many Triton kernels were found in Triton's cache, and how many were compiled."""

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
            report: called after each compilation with the name of the kernel and the seconds of the compilation.
        """
        self._report = report
        self.num_hits = 0
        """Number of kernels found in the cache."""
        self.missed: Counter[str] = Counter()
        """Number of compiled variants by kernel name."""
        self.seconds = 0.0
        """Total seconds of all compilations."""

    def start(self) -> None:
        """Starts counting, if this process has imported PyTorch and Triton is installed."""
        if "torch" in sys.modules and importlib.util.find_spec("triton") is not None:
            import triton  # absent from torch's builds for CPUs

            triton.knobs.compilation.listener = self._count

    @property
    def num_misses(self) -> int:
        """Returns the number of compiled kernels."""
        return sum(self.missed.values())

    def describe(self) -> dict[str, Any]:
        """Returns the counts by name."""
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
