"""Writes, syncs and renames checkpoint files, so that a file or folder under its final name is complete."""

import hashlib
import os
import threading
from pathlib import Path
from types import TracebackType

from beit3_ds.regular_file import open_regular

_CHUNK_BYTES = 1 << 24
_SYNC_BYTES = 1 << 26


class NewFile:
    """Writes a new file sequentially in a `with` block, and syncs it to disk at the end of the block.

    A thread also syncs the file during writing, so that the operating system does not block the writer later.

    Args:
        path: path of the file.
        with_digest: whether to compute the SHA-256 digest of the content.

    Raises:
        FileExistsError: if the file exists.
        OSError: if the disk is full, cannot be written, or was removed. Bytes written before the error stay on disk.
    """

    def __init__(self, path: Path, *, with_digest: bool = True) -> None:
        self.path, self.num_bytes = path, 0
        self._digest = hashlib.sha256() if with_digest else None
        self._sync: threading.Thread | None = None
        self._sync_error: OSError | None = None
        self._sync_begun = 0

    def __enter__(self) -> "NewFile":
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._sync:
                self._sync.join()
            if error is None:
                if self._sync_error:
                    raise self._sync_error  # the system reports an error only once; the next sync would succeed
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

    @property
    def sha256(self) -> str:
        """Returns the SHA-256 digest of the bytes written so far, in hexadecimal; empty without `with_digest`."""
        return self._digest.hexdigest() if self._digest else ""

    def write(self, content: bytes | memoryview) -> None:
        """Appends all bytes to the file."""
        rest = memoryview(content).cast("B")
        while rest:
            chunk = rest[:_CHUNK_BYTES]
            written = os.write(self._descriptor, chunk)
            if self._digest:
                self._digest.update(chunk[:written])
            self.num_bytes += written
            rest = rest[written:]
            if self.num_bytes - self._sync_begun >= _SYNC_BYTES and not (self._sync and self._sync.is_alive()):
                self._sync_begun = self.num_bytes
                self._sync = threading.Thread(target=self._sync_data, name="sync", daemon=True)
                self._sync.start()

    def _sync_data(self) -> None:
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            self._sync_error = self._sync_error or error


def write_whole(path: Path, content: bytes) -> None:
    """Writes a small file atomically: readers see either the old file or the new file."""
    aside = path.with_name(
        f".{path.name}.new"
    )  # one name for all processes, so that killed ones leave one file at most
    aside.unlink(missing_ok=True)
    try:
        with NewFile(aside) as file:
            file.write(content)
        rename(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def rename(source: Path, target: Path) -> None:
    """Renames a file or folder to `target`, and syncs the parent folder of `target`.

    A renamed file replaces a file at `target`.

    Raises:
        OSError: if renaming fails, for example because `target` is a non-empty folder.
    """
    os.replace(source, target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Syncs a folder to disk, so that the names of its files survive a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 digest of a regular file, in hexadecimal."""
    with open(open_regular(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
