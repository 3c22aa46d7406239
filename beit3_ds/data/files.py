"""Files: those that the glob patterns of a config name, and new ones that are whole or absent."""

import glob
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from beit3_ds.config import ConfigError


def expand_patterns(patterns: Iterable[str]) -> list[str]:
    """Lists the files that glob patterns name: in the order of the patterns, sorted within each.

    The order is part of the data order, so it must not depend on the file system; `**` crosses folders.

    Raises:
        ConfigError: for a pattern without a match, or a file that two patterns match (its samples would count twice).
    """
    files: list[str] = []
    for pattern in patterns:
        # A name that exists is taken literally: it may hold brackets.
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            folder = os.path.dirname(os.path.abspath(pattern))
            raise ConfigError(
                f"data: no file matches '{pattern}' (looked in {folder}). Correct the path in the config."
            )
        files.extend(matches)
    seen: set[str] = set()
    for file in files:
        if os.path.realpath(file) in seen:
            raise ConfigError(f"data: {file} is listed twice; let only one pattern match it.")
        seen.add(os.path.realpath(file))
    return files


@contextmanager
def written_aside(path: Path, keep: bool = True) -> Iterator[BinaryIO]:
    """A new file that takes the name `path` when all is written, or none if `keep` is false or after an error."""
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w+b") as file:
            yield file
            if keep:
                file.flush()
                os.fsync(file.fileno())  # a name must not outlive a crash that the bytes do not
        if keep:
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
