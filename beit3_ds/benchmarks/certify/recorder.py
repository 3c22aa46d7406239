"""Records the measurements of one section, each at once, and skips those that are recorded already."""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from beit3_ds.benchmarks.certify.results import ResultsFile, has_failed


class NeedsDeviceError(RuntimeError):
    """Reports that a section has no form for a CPU."""


class Recorder:
    """Measures the items of one section."""

    def __init__(self, section: str, path: Path, call: int, is_dry_run: bool = False) -> None:
        """Reads which items are recorded.

        Items that succeeded in any call are known, and so are those that began in this call: one of them may have
        crashed the section, which then continues behind it.

        Args:
            section: name of the section.
            path: file of the results.
            call: number of this call of `beit3 certify`.
            is_dry_run: whether results are undefined (`dry_run`), so that no check counts.
        """
        self._is_dry_run = is_dry_run
        self._section, self._file, self._call = section, ResultsFile(path), call
        self.folder = path.parent
        """Folder of the report, for files that belong to it."""
        self._known = {
            line["item"]
            for line in self._file.read()
            if line.get("section") == section
            and "item" in line
            and (line["call"] == call or not (has_failed(line) or line.keys() & {"absent", "warning"}))
        }

    def knows(self, item: str) -> bool:
        """Returns whether an item is recorded already."""
        return item in self._known

    def add(self, item: str, **figures: Any) -> None:
        """Appends a line with figures."""
        self._file.append({"section": self._section, "item": item, "call": self._call, **figures})

    def measure(self, item: str, compute: Callable[[], dict[str, Any]]) -> None:
        """Computes the figures of an item and appends them, or the error, so that other items are still measured.

        An error of the CUDA driver is raised again, because nothing can run in this process afterwards.

        Args:
            item: name of the item, unique in its section.
            compute: returns the figures; `passed`, if present, tells whether a check passed.
        """
        if item in self._known:
            return
        self._known.add(item)
        self.add(item, begun=True)
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
    """Returns whether the missing module is this project's, which is a mistake and not an absent package."""
    return top_level(error) == "beit3_ds"


def top_level(error: ModuleNotFoundError) -> str:
    """Returns the name of the missing package."""
    return (error.name or str(error)).split(".")[0]
