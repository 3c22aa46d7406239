"""Runs the measurements of a section, and writes each result to the results file as soon as it is known.

Measurements that succeeded in an earlier call of `beit3 certify` are skipped.
"""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from beit3_ds.benchmarks.certify.results import CACHE_ITEM, ResultsFile, has_failed
from beit3_ds.kernels.triton.compilations import Compilations


class NeedsDeviceError(RuntimeError):
    """Reports that a section cannot run on a CPU."""


class Recorder:
    """Runs and records the measurements of one section. A named measurement is called an item."""

    def __init__(self, section: str, path: Path, call: int, is_dry_run: bool = False) -> None:
        """Reads from the results file which measurements (items) to skip.

        Measurements that succeeded in any call of `beit3 certify` are skipped. Measurements that already began in this
        call are skipped too. So if a measurement crashes the section's process, the new process continues with the next
        measurement.

        Args:
            section: name of the section.
            path: path of the results file.
            call: number of this call of `beit3 certify`.
            is_dry_run: whether this is a dry run (`dry_run`). In a dry run, the results of kernels are undefined, so
                their checks are not recorded.
        """
        self._is_dry_run = is_dry_run
        self._compilations, self._num_counted = Compilations(), 0
        self._section, self._file, self._call = section, ResultsFile(path), call
        self.folder = path.parent
        """Folder of the report. Sections may store further files there."""
        self._known = {
            line["item"]
            for line in self._file.read()
            if line.get("section") == section
            and "item" in line
            and (line["call"] == call or not (has_failed(line) or line.keys() & {"absent", "warning"}))
        }

    def add(self, item: str, **figures: Any) -> None:
        """Appends one line with the figures of an item (named measurement) to the results file."""
        self._file.append({"section": self._section, "item": item, "call": self._call, **figures})

    def start_counting(self) -> None:
        """Starts counting the kernels that Triton finds in its cache, and the kernels that Triton compiles."""
        self._compilations.start()

    def add_counts(self) -> None:
        """Appends to the results file how many kernels Triton found in its cache, and how many it compiled.

        Appends nothing if both numbers are unchanged since the last call. `measure` calls this method.
        """
        number = self._compilations.num_hits + self._compilations.num_misses
        if number > self._num_counted:
            self._num_counted = number
            self.add(CACHE_ITEM, **self._compilations.describe(), process=os.getpid())

    def measure(self, item: str, compute: Callable[[], dict[str, Any]]) -> None:
        """Runs a measurement, and records the figures or the error.

        Does nothing if the measurement already began in this call of `beit3 certify`, or succeeded in an earlier call.
        After most errors, the section continues with other measurements. An error of CUDA is recorded and raised again,
        because the process cannot use the GPU any more. `NeedsDeviceError` and the error about a missing module of this
        project are raised, but not recorded.

        Args:
            item: name of the measurement, unique within the section.
            compute: function that returns the figures by name. The optional figure `passed` tells whether a check
                passed.
        """
        if item in self._known:
            return
        self._known.add(item)
        self.add(item, begun=True)
        try:
            self._measure(item, compute)
        finally:
            self.add_counts()

    def _measure(self, item: str, compute: Callable[[], dict[str, Any]]) -> None:
        try:
            figures = compute()
        except ModuleNotFoundError as error:
            if is_own(error):
                raise
            self.add(item, absent=top_level(error))
        except NeedsDeviceError:
            raise
        except Exception as error:  # any failure of a kernel, a baseline or a library is a result
            if self._is_dry_run and isinstance(error, NotImplementedError):
                self.add(item, not_run=f"it has no form for CPU tensors: {str(error)[:100]}")
                return
            traceback.print_exc()
            self.add(item, error=f"{type(error).__name__}: {str(error)[:500]}")
            if "CUDA error" in str(error):
                raise
        else:
            if self._is_dry_run:
                figures.pop("passed", None)
            self.add(item, **figures)
            shown = ", ".join(
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in figures.items()
            )
            print(f"{item}: {shown}", file=sys.stderr, flush=True)


def is_own(error: ModuleNotFoundError) -> bool:
    """Returns whether the missing module belongs to this project. In that case, the error is a bug."""
    return top_level(error) == "beit3_ds"


def top_level(error: ModuleNotFoundError) -> str:
    """Returns the name of the top-level package that could not be imported."""
    return (error.name or str(error)).split(".")[0]
