"""A folder whose files are read by their paths inside it."""

import os
import stat

from beit3_ds.data.files.descriptors import read_fully
from beit3_ds.data.files.reading import read_with_retries, storage_error


class Folder:
    """A folder whose files are read whole; no name leads out of it.

    A name may pass through links to folders, which the owner of the folder made (ImageNet's classes are often linked
    together). It may not lead out by `..` or as an absolute path, which an annotation file could contain. A link to a
    single file outside is not read.

    A missing file is a fault of the data only while the opened folder is still at its path. If the folder is gone, or
    another one is at its path, it was unmounted.

    Attributes:
        path: its path without links.
    """

    def __init__(self, path: str) -> None:
        """Opens a folder.

        Raises:
            OSError: if it is not a folder, or cannot be read.
        """
        self.path = os.path.realpath(path)
        self._inode = read_with_retries(lambda: _inode(self.path), self.path)

    def contains(self, name: str) -> bool:
        """Returns whether `name` is in the folder, or in a folder that a link in it leads to.

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
        """Returns whether `read` would find a file `name`; opens no file.

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
            ValueError: if it is outside, missing, forbidden, not a regular file, or longer than `limit` bytes.
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
    """Returns the inode of a folder that can be listed; an automounter may change the device number, not this."""
    with os.scandir(path):
        return os.stat(path).st_ino


def _lies_in(path: str, folder: str) -> bool:
    return path.startswith(os.path.join(folder, ""))
