"""Reads JSON lines: one object per line, with keys that every line must have."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from beit3_ds.config import ConfigError
from beit3_ds.data.files.json_lists import open_json_text
from beit3_ds.printing import printable

_SHOWN = 80


def iterate_json_lines(path: str, required: Mapping[str, type]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the line number, counted from 1, and the JSON object of each line; skips blank lines.

    Args:
        path: UTF-8 file, with or without a byte order mark.
        required: keys that every object must have, with the type of their values.

    Raises:
        ConfigError: if the file cannot be read, or a line is not an object with the required keys; the message names
            the line.
        StorageError: if the file system fails.
    """
    shown, number = printable(path), 0
    try:
        with open_json_text(path) as file:
            for number, line in enumerate(iter(file.readline, ""), start=1):
                if line.strip():
                    yield number, _object(line, required, f"{shown}:{number}")
    except (OSError, UnicodeDecodeError) as error:
        place = f" after line {number}" if number else ""
        raise ConfigError(f"data: {shown} cannot be read{place}: {error}. Correct the path.") from error
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"data: {shown} is no file of JSON lines: {error}.") from error


def _object(line: str, required: Mapping[str, type], where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"data: {where} is not JSON: {error}. Write one object per line.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"data: {where} is {line.strip()[:_SHOWN]!r} and not an object, such as {{...}}.")
    for key, kind in required.items():
        if not isinstance(found.get(key), kind):
            has = f"{key}={str(found[key])[:_SHOWN]!r}" if key in found else f"no '{key}'"
            raise ConfigError(f"data: {where} has {has}; every line needs '{key}' ({kind.__name__}).")
    return found
