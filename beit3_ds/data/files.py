"""From the glob patterns of a config to a list of files."""

import glob
import os
from collections.abc import Iterable

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
