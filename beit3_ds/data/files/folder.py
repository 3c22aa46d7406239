"""Reads files of a folder by their paths relative to the folder."""

import os
import stat

from beit3_ds.data.files.descriptors import read_fully
from beit3_ds.data.files.reading import read_with_retries, storage_error


class Folder:
    """Reads whole files of one folder. The names of the files come from annotation files, and are paths relative to the
    folder.

    A name must not lead out of the folder through `..`, an absolute path or a symbolic link to a file. Symbolic links
    to folders are allowed; a file in a linked folder counts as inside.

    A missing file is an error in the data. A missing or replaced folder is a storage error: it shows that the file
    system was unmounted.

    Attributes:
        path: absolute path of the folder, with all links resolved.
    """

    def __init__(self, path: str) -> None:
        """Opens a folder.

        Raises:
            OSError: if the path is not a folder, or the folder cannot be read.
            StorageError: if the file system fails.
        """
        self.path = os.path.realpath(path)
        self._inode = read_with_retries(lambda: _inode(self.path), self.path)

    def contains(self, name: str) -> bool:
        """Returns whether the path `name` stays inside the folder; files behind links to other folders count as inside.

        Raises:
            ValueError: if the name contains a NUL character.
        """
        path = os.path.join(self.path, name)
        real = os.path.realpath(path)
        if _is_below(real, self.path):
            return True
        if os.path.isabs(name) or ".." in name.split(os.sep):
            return False
        return _is_below(real, os.path.realpath(os.path.dirname(path)))

    def holds(self, name: str) -> bool:
        """Returns whether `name` is an existing regular file inside the folder; does not open the file.

        Raises:
            StorageError: if the file system fails.
        """
        path = os.path.join(self.path, name)
        try:
            return self.contains(name) and stat.S_ISREG(read_with_retries(lambda: os.stat(path), path).st_mode)
        except (OSError, ValueError):  # a name with NUL
            return False

    def read(self, name: str, limit: int) -> bytes:
        """Returns the content of the file `name`.

        Raises:
            ValueError: if the file is outside the folder, missing, forbidden, not a regular file, or longer than
                `limit` bytes.
            StorageError: if the file system fails, or the folder no longer exists.
        """
        path = os.path.join(self.path, name)
        try:
            return read_with_retries(lambda: self._read(name, path, limit), path)
        except OSError as error:
            self._check_is_there()
            # Without the name of the file, so that equal reasons give equal messages.
            raise ValueError(error.strerror) from error

    def _read(self, name: str, path: str, limit: int) -> bytes:
        if not self.contains(name):
            raise ValueError(f"it leads out of the folder {self.path}")
        # Opening a pipe would wait for its other end.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("not a regular file")
            if status.st_size > limit:
                raise ValueError(f"{status.st_size} bytes exceed the limit of {limit}")
            return read_fully(
                descriptor, 0, status.st_size
            )  # one system call; a file object needs a second call to detect the end
        finally:
            os.close(descriptor)

    def _check_is_there(self) -> None:
        try:
            found = read_with_retries(lambda: _inode(self.path), self.path)
        except OSError as error:
            raise storage_error(self.path, error, attempts=1) from error
        if found != self._inode:
            raise storage_error(self.path, OSError("another folder is there now"), attempts=1)


def _inode(path: str) -> int:
    """Returns the inode number of a readable folder. Unlike the device number, the inode number survives a remount."""
    with os.scandir(path):
        return os.stat(path).st_ino


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(os.path.join(folder, ""))
