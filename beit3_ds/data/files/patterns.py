"""Expands the glob patterns in a config to lists of files."""

import glob
import heapq
import os
import re
import stat
from collections.abc import Iterable, Iterator

from beit3_ds.config import ConfigError
from beit3_ds.data.files.reading import read_with_retries

# Matches the innermost braces that contain a comma or a range.
_BRACES = re.compile(r"\{(?:(?P<first>[0-9]{1,18})\.\.(?P<last>[0-9]{1,18})|(?P<list>[^{}]*,[^{}]*))\}")
_MAX_NAMES = 1_000_000


def expand_patterns(patterns: Iterable[str]) -> list[str]:
    """Lists the files that match glob patterns, in the order of the patterns.

    Patterns have the syntax of a shell: `*`, `?`, `[abc]`, `**` for folders of any depth, `~`, and braces as in
    `shard-{0000..0127}.tar`. Every alternative in braces must have a match. Alternatives keep their order. The matches
    of a pattern or an alternative are sorted by path. `**` follows links to folders and visits each folder once; a
    pattern that ends in `**` lists only files. If a pattern or an alternative is the path of an existing file or
    folder, it matches only this path.

    Raises:
        ConfigError: if a pattern or an alternative in braces matches nothing, if a folder matches a pattern with
            wildcards and the pattern does not end in `**`, if a match is a pipe, a socket or a device, or if a file is
            matched twice.
        StorageError: if the file system fails.
    """
    files: list[str] = []
    for pattern in patterns:
        # A path that exists is taken literally: it may contain brackets and braces.
        for part in [pattern] if os.path.exists(pattern) else expand_braces(pattern):
            files.extend(_matches(os.path.expanduser(part), pattern))
    seen: set[str] = set()
    for file in files:
        _check_is_file_or_folder(file)
        if os.path.realpath(file) in seen:
            raise ConfigError(f"data: {file} is listed twice; let only one pattern match it.")
        seen.add(os.path.realpath(file))
    return files


def expand_braces(pattern: str) -> list[str]:
    """Expands braces such as `{a,b}` and `{008..012}` to all names, as bash does; leaves other braces unchanged.

    Raises:
        ConfigError: if a range has more than a million numbers, or there are more than a million names.
    """
    # Each pass expands the innermost braces, so the braces that enclose them come next. The dict drops repeated names.
    names, is_done = {pattern: None}, False
    while not is_done:
        is_done, expanded = True, dict[str, None]()
        for name in names:
            match = _BRACES.search(name)
            is_done = is_done and match is None
            for choice in _choices(match, pattern) if match else ("",):
                before, after = (name[: match.start()], name[match.end() :]) if match else (name, "")
                expanded[f"{before}{choice}{after}"] = None
                if len(expanded) > _MAX_NAMES:
                    raise ConfigError(f"data: the braces of '{pattern}' spell out more than {_MAX_NAMES:,} names.")
        names = expanded
    return list(names)


def _choices(braces: re.Match[str], pattern: str) -> Iterable[str]:
    if braces["first"] is None:
        return braces["list"].split(",")
    first, last = braces["first"], braces["last"]
    if abs(int(last) - int(first)) >= _MAX_NAMES:
        raise ConfigError(f"data: the range {braces[0]} of '{pattern}' has more than {_MAX_NAMES:,} numbers.")
    width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
    step = 1 if int(first) <= int(last) else -1
    return (f"{number:0{width}d}" for number in range(int(first), int(last) + step, step))


def is_inside(path: str, folder: str) -> bool:
    """Returns whether a path is below a folder after all symbolic links are resolved."""
    return os.path.realpath(path).startswith(os.path.join(os.path.realpath(folder), ""))


def list_folders(base: str) -> Iterator[str]:
    """Yields the folder `base` and all visible folders below it, each once.

    Symbolic links to folders are followed, except links to a folder that contains `base`.

    Raises:
        ConfigError: if a folder cannot be listed.
        StorageError: if the file system fails.
    """
    top = os.path.join(os.path.realpath(base or os.curdir), "")
    seen: set[tuple[int, int]] = set()
    folders, links = [base], list[str]()
    while folders or links:
        folder = folders.pop() if folders else heapq.heappop(links)
        path = folder or os.curdir
        try:
            status = read_with_retries(lambda path=path: os.stat(path), path)  # type: ignore[misc]
            if not stat.S_ISDIR(status.st_mode) or (status.st_dev, status.st_ino) in seen:
                continue
            entries = read_with_retries(lambda path=path: _visible(path), path)  # type: ignore[misc]
        except OSError as error:
            raise ConfigError(
                f"data: folder {path} cannot be listed: {error}. Make it readable, or move it."
            ) from error
        seen.add((status.st_dev, status.st_ino))
        yield folder
        for entry in entries:
            if entry.is_symlink():
                if os.path.isdir(entry.path) and not top.startswith(os.path.join(os.path.realpath(entry.path), "")):
                    heapq.heappush(links, os.path.join(folder, entry.name))
            elif entry.is_dir():
                folders.append(os.path.join(folder, entry.name))


def check_no_hard_link(files: Iterable[str]) -> None:
    """Checks that no two paths are hard links to one file; `expand_patterns` does not detect hard links.

    Raises:
        ConfigError: if two paths are hard links to one file; the message names both paths.
        StorageError: if the file system fails.
    """
    seen: dict[tuple[int, int], str] = {}
    for file in files:
        status = _stat(file)
        if status is None or status.st_nlink < 2 or not stat.S_ISREG(status.st_mode):
            continue
        first = seen.setdefault((status.st_dev, status.st_ino), file)
        if first != file:
            raise ConfigError(f"data: {file} and {first} are the same file; let only one pattern match it.")


def _check_is_file_or_folder(file: str) -> None:
    """Checks that a path is a file or a folder, because reading a pipe, a socket or a device may never end.

    Raises:
        ConfigError: if the path is a pipe, a socket or a device.
    """
    status = _stat(file)
    if status is not None and not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise ConfigError(f"data: {file} is a pipe, a socket or a device. Name files, or match them with a pattern.")


def _stat(file: str) -> os.stat_result | None:
    try:
        return read_with_retries(lambda: os.stat(file), file)
    except OSError:  # opening the file reports the error
        return None


def _matches(path: str, pattern: str) -> list[str]:
    if os.path.exists(path):
        return [path]
    matches = sorted(_glob(path))
    if not matches:
        within = "" if path == pattern else f", which is part of '{pattern}'"
        folder = os.path.dirname(os.path.abspath(path))
        raise ConfigError(
            f"data: no file matches '{path}'{within} (looked in {folder}). Correct the path in the config."
        )
    folders = [match for match in matches if os.path.isdir(match)]
    if folders and not path.rstrip(os.sep).endswith("**"):  # `**` matches folders together with the files in them
        raise ConfigError(
            f"data: '{pattern}' matches the folder {folders[0]}. Match files, for example with "
            f"'{os.path.join(path, '*')}', or give each folder of images an entry of its own."
        )
    return [match for match in matches if not os.path.isdir(match)]


def _glob(path: str) -> list[str]:
    """Returns the paths that match a glob pattern. Unlike Python's `glob`, this function does not follow circular links
    forever.

    Raises:
        ConfigError: if a folder below `**` cannot be read.
        StorageError: if the file system fails.
    """
    parts = path.rstrip(os.sep).split(os.sep)
    if "**" not in parts:
        return glob.glob(path)
    number = parts.index("**")
    above = os.sep.join(parts[:number]) or (os.sep if path.startswith(os.sep) else "")
    below = os.path.join("", *parts[number + 1 :]) or "*"
    bases = glob.glob(above) if above else [""]
    return [
        match
        for base in bases
        for folder in list_folders(base)
        for match in _glob(os.path.join(glob.escape(folder), below))
    ]


def _visible(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]
