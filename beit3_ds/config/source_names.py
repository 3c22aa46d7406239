"""Derives short names of data sources from their paths, for metrics and tables."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath

_LONGEST = 40
_EXTENSIONS = re.compile(r"(\.(tar|txt|json|jsonl|ndjson|jsonlines|tsv|csv|gz|zst))+$", re.IGNORECASE)


def short_source_names(paths: Sequence[str]) -> list[str]:
    """Returns a unique short name per path: the file name, preceded by parent folders if file names are equal.

    Names contain only letters, digits, dots and underscores. Names that would still be equal get a number.

    Args:
        paths: paths of files or folders, or glob patterns.
    """
    parts = [[part for part in PurePath(path).parts if part not in ("/", ".", "..")] or ["source"] for path in paths]
    depths = [1] * len(paths)
    for _ in range(max(map(len, parts), default=0)):
        names = [_join(own[-depth:]) for own, depth in zip(parts, depths, strict=True)]
        counts = Counter(names)
        depths = [depth + (counts[name] > 1) for name, depth in zip(names, depths, strict=True)]
    names = [_join(own[-depth:]) for own, depth in zip(parts, depths, strict=True)]
    taken: set[str] = set()
    unique = []
    for name in names:
        number, candidate = 1, name
        while candidate in taken:
            number += 1
            candidate = f"{name}_{number}"
        taken.add(candidate)
        unique.append(candidate)
    return unique


def _join(parts: Sequence[str]) -> str:
    *folders, last = parts
    text = "-".join([*folders, _EXTENSIONS.sub("", last) or last])
    return re.sub(r"[^A-Za-z0-9.]+", "_", text.replace("-", "_")).strip("_.")[-_LONGEST:].strip("_.") or "source"
