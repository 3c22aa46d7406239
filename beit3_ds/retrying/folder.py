"""Writes the result files, pages and pictures of a run, which does not fail if one cannot be written."""

from collections.abc import Callable
from pathlib import Path

WriteFile = Callable[[Path], None]
"""Function that writes a file at a path."""


class ResultFolder:
    """Writes files into a folder; a file that cannot be written is reported, and kept for `retry`."""

    def __init__(self, path: Path, report: Callable[[str], None]) -> None:
        """Stores the arguments; the first file creates the folder.

        Args:
            path: the folder.
            report: receives one line per file that cannot be written.
        """
        self.path, self._report = path, report
        self._missing: dict[Path, WriteFile] = {}

    def inside(self, name: str) -> "ResultFolder":
        """Returns a folder below this one, whose missing files count as missing here."""
        folder = ResultFolder(self.path / name, self._report)
        folder._missing = self._missing
        return folder

    @property
    def missing(self) -> list[Path]:
        """Returns the paths of files that a disk has refused."""
        return list(self._missing)

    def write(self, name: str | Path, write: WriteFile) -> bool:
        """Writes a file, and returns whether that succeeded; any error is reported in one line.

        Args:
            name: name of the file in the folder, or its whole path.
            write: writes the file. It is called again by `retry` if the error is one of the disk.
        """
        path = self.path / name
        self._missing.pop(path, None)
        error = self._try(path, write)
        if error is None:
            return True
        if isinstance(error, OSError):
            self._missing[path] = write
        why = " ".join(str(error).split())
        self._report(f"WARNING: {path} was not written: {type(error).__name__}: {why}")
        return False

    def retry(self) -> None:
        """Writes the missing files if that is possible now."""
        for path, write in list(self._missing.items()):
            if self._try(path, write) is None:
                del self._missing[path]
                self._report(f"{path} is written now")

    def _try(self, path: Path, write: WriteFile) -> Exception | None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
        except Exception as error:  # a missing font, a full disk or a broken library must not fail a finished run
            return error
        return None
