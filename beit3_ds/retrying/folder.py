"""Writes the result files, pages and pictures of a run; a failed write does not end the run."""

from collections.abc import Callable
from pathlib import Path

WriteFile = Callable[[Path], None]
"""Function that writes a file at the given path."""


class ResultFolder:
    """Writes files into a folder. A failed write is reported, and `retry` can repeat it later."""

    def __init__(self, path: Path, report: Callable[[str], None]) -> None:
        """Stores the arguments; the first write creates the folder.

        Args:
            path: path of the folder.
            report: function that takes one line of text; called for each file that cannot be written.
        """
        self.path, self._report = path, report
        self._missing: dict[Path, WriteFile] = {}

    def inside(self, name: str) -> "ResultFolder":
        """Returns a subfolder that shares this folder's list of missing files."""
        folder = ResultFolder(self.path / name, self._report)
        folder._missing = self._missing
        return folder

    @property
    def missing(self) -> list[Path]:
        """Returns the paths of the files that could not be written because of an `OSError`."""
        return list(self._missing)

    def write(self, name: str | Path, write: WriteFile) -> bool:
        """Writes a file and returns whether that succeeded; reports any error in one line.

        Args:
            name: name of the file in the folder, or an absolute path.
            write: function that writes the file. After an `OSError`, `retry` calls it again.
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
        """Tries again to write the missing files."""
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
