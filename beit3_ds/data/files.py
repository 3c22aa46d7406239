"""The files that the glob patterns of a config name."""

import glob
import os
import re
from collections.abc import Iterable

from beit3_ds.config import ConfigError

# The innermost braces with a comma or a range.
_BRACES = re.compile(r"\{(?:(?P<first>\d+)\.\.(?P<last>\d+)|(?P<list>[^{}]*,[^{}]*))\}")
_MAX_RANGE = 1_000_000


def expand_patterns(patterns: Iterable[str]) -> list[str]:
    """Lists the files that patterns name: in the order of the patterns, sorted within each.

    Patterns are those of a shell: `*`, `?`, `[abc]`, `**` across folders, `~`, and braces as WebDataset's users write
    them, `shard-{0000..0127}.tar` and `{train,extra}-*.tar`. What braces spell out must all be there. The order is part
    of the data order, so it must not depend on the file system.

    Raises:
        ConfigError: for a pattern, or a part of its braces, without a match; for a folder among the matches; for a file
            that two patterns match (its samples would count twice).
    """
    files: list[str] = []
    for pattern in patterns:
        # A name that exists is taken literally: it may hold brackets and braces.
        for part in [pattern] if os.path.exists(pattern) else expand_braces(pattern):
            files.extend(_matches(os.path.expanduser(part), pattern))
    seen: set[str] = set()
    for file in files:
        if os.path.realpath(file) in seen:
            raise ConfigError(f"data: {file} is listed twice; let only one pattern match it.")
        seen.add(os.path.realpath(file))
    return files


def expand_braces(pattern: str) -> list[str]:
    """Expands `{a,b}` and `{008..012}` as bash does; braces of another form stay as they are.

    Raises:
        ConfigError: for a range of more than a million numbers.
    """
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    before, after = pattern[: match.start()], pattern[match.end() :]
    if match["first"] is None:
        choices = match["list"].split(",")
    else:
        first, last = match["first"], match["last"]
        if abs(int(last) - int(first)) >= _MAX_RANGE:
            raise ConfigError(f"data: the range {match[0]} of '{pattern}' has more than {_MAX_RANGE:,} numbers.")
        width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
        step = 1 if int(first) <= int(last) else -1
        choices = [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]
    # Inner braces are found first: what remains around them may hold some more, and gives what is outside repeatedly.
    parts = [part for choice in choices for part in expand_braces(f"{before}{choice}{after}")]
    return list(dict.fromkeys(parts))


def _matches(path: str, pattern: str) -> list[str]:
    if os.path.exists(path):
        return [path]
    matches = sorted(glob.glob(path, recursive=True))
    if not matches:
        within = "" if path == pattern else f", which is part of '{pattern}'"
        folder = os.path.dirname(os.path.abspath(path))
        raise ConfigError(
            f"data: no file matches '{path}'{within} (looked in {folder}). Correct the path in the config."
        )
    folders = [match for match in matches if os.path.isdir(match)]
    if folders and not path.rstrip(os.sep).endswith("**"):  # which matches the files in them, too
        raise ConfigError(
            f"data: '{pattern}' matches the folder {folders[0]}. Match files, for example with "
            f"'{os.path.join(path, '*')}', or give each folder of images an entry of its own."
        )
    return [match for match in matches if not os.path.isdir(match)]
