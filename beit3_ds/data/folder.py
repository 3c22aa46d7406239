"""One folder of files that are read by their paths in it."""

import os
import stat

from beit3_ds.data.file_reading import read_with_retries, storage_error
from beit3_ds.data.open_files import read_fully


class Folder:
    """A folder whose files are read whole, never outside of it by a name.

    A name may pass through links to folders: whoever made the folder made them, as ImageNet's classes are often linked
    together. It may not lead out by `..` or as an absolute path, which an annotation file can claim, and a link to a
    single file outside is not read.

    A missing file is a fault of the data only while its folder is the one that was opened. A folder that is gone, or
    another one at its path, was unmounted.

    Attributes:
        path: its path without links.
    """

    def __init__(self, path: str) -> None:
        """Opens a folder.

        Raises:
            OSError: if it is none, or cannot be read.
        """
        self.path = os.path.realpath(path)
        self._inode = read_with_retries(lambda: _inode(self.path), self.path)

    def contains(self, name: str) -> bool:
        """Whether `name` lies in the folder, or in a folder that a link in it leads to.

        Raises:
            ValueError: for a name with NUL.
        """
        path = os.path.join(self.path, name)
        real = os.path.realpath(path)
        if _lies_in(real, self.path):
            return True
        if os.path.isabs(name) or ".." in name.split(os.sep):
            return False
        return _lies_in(real, os.path.realpath(os.path.dirname(path)))

    def holds(self, name: str) -> bool:
        """Whether `read` would find a file `name`; opens none.

        Raises:
            StorageError: if the file system fails.
        """
        path = os.path.join(self.path, name)
        try:
            return self.contains(name) and stat.S_ISREG(read_with_retries(lambda: os.stat(path), path).st_mode)
        except (OSError, ValueError):  # a name with NUL
            return False

    def read(self, name: str, limit: int) -> bytes:
        """Reads the file `name`.

        Raises:
            ValueError: if it lies outside, is missing, forbidden or no plain file, or is longer than `limit` bytes.
            StorageError: if the file system fails, or the folder is no longer there.
        """
        path = os.path.join(self.path, name)
        try:
            return read_with_retries(lambda: self._read(name, path, limit), path)
        except OSError as error:
            self._check_still_there()
            # The text of the error names the file, which would make every message another reason.
            raise ValueError(error.strerror) from error

    def _read(self, name: str, path: str, limit: int) -> bytes:
        if not self.contains(name):
            raise ValueError(f"it leads out of the folder {self.path}")
        # Opening a pipe would wait for its other end.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("no plain file")
            if status.st_size > limit:
                raise ValueError(f"{status.st_size} bytes exceed the limit of {limit}")
            return read_fully(descriptor, 0, status.st_size)  # one call: a file object asks once more for the end
        finally:
            os.close(descriptor)

    def _check_still_there(self) -> None:
        try:
            found = read_with_retries(lambda: _inode(self.path), self.path)
        except OSError as error:
            raise storage_error(self.path, error, attempts=1) from error
        if found != self._inode:
            raise storage_error(self.path, OSError("another folder is there now"), attempts=1)


def _inode(path: str) -> int:
    """Inode of a folder that can be listed. Its device number would change when an automounter mounts it again."""
    with os.scandir(path):
        return os.stat(path).st_ino


def _lies_in(path: str, folder: str) -> bool:
    return path.startswith(os.path.join(folder, ""))
