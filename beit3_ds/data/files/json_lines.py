"""Reads JSON lines: one object per line, with required keys."""

from collections.abc import Iterator, Mapping
from typing import Any

from beit3_ds.config import ConfigError
from beit3_ds.data.files.kinds import check_is_text
from beit3_ds.data.files.lines import skip_blank_lines
from beit3_ds.data.files.reading import open_for_reading
from beit3_ds.printing import printable
from beit3_ds.untrusted_json import MAX_JSON_BYTES, parse_untrusted_json

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SHOWN = 80


def iterate_json_lines(path: str, required: Mapping[str, type]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the line number, counted from 1, and the JSON object of each line; skips blank lines.

    Args:
        path: UTF-8 file, with or without a byte order mark.
        required: required keys of every object, with the type of each value.

    Raises:
        ConfigError: if the file cannot be read, or a line is not an object with the required keys. The message names
            the line.
        StorageError: if the file system fails.
    """
    shown, number = printable(path), 0
    try:
        check_is_text(path)
        with open_for_reading(path) as file:
            while line := file.readline(MAX_JSON_BYTES + 1):
                number += 1
                if not line.isspace():
                    yield number, _object(line, required, f"{shown}:{number}")
                    continue
                number += skip_blank_lines(file)[0]
    except OSError as error:
        place = f" after line {number}" if number else ""
        raise ConfigError(f"data: {shown} cannot be read{place}: {error}. Correct the path.") from error
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"data: {shown} is not a file of JSON lines: {error}.") from error


def _object(line: bytes, required: Mapping[str, type], where: str) -> dict[str, Any]:
    try:
        text = line.decode("utf-8-sig" if line.startswith(_BYTE_ORDER_MARK) else "utf-8")
        found = parse_untrusted_json(text, accepts_constants=True)
    except ValueError as error:
        raise ConfigError(f"data: {where} is not JSON: {error}. Write one object per line.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"data: {where} is {text.strip()[:_SHOWN]!r} and not an object, such as {{...}}.")
    for key, kind in required.items():
        if not isinstance(found.get(key), kind):
            has = f"{key}={str(found[key])[:_SHOWN]!r}" if key in found else f"no '{key}'"
            raise ConfigError(f"data: {where} has {has}; every line needs '{key}' ({kind.__name__}).")
    return found
