"""Reads lists from JSON files of any size; keeps one list element in memory at a time."""

import contextlib
import io
import json
import re
from collections.abc import Iterator
from typing import Any

from beit3_ds.config import ConfigError
from beit3_ds.data.files.kinds import check_is_text
from beit3_ds.data.files.reading import open_for_reading
from beit3_ds.untrusted_json import check_json_size

_CHUNK = 1 << 20
_MAX_ELEMENT = 1 << 22
"""Maximum characters of one list element, or of one object member that is not a list."""
_BLANKS = re.compile(r"[ \t\r\n]*")
_BLANKS_AND_COMMAS = re.compile(r"[ \t\r\n,]*")


def iterate_json_list(path: str, *keys: str) -> Iterator[Any]:
    """Yields the elements of a JSON list, or of lists inside a JSON object.

    Args:
        path: UTF-8 file, with or without a byte order mark.
        keys: keys of the object's lists to read; other members are skipped. Elements come in the order of the file.
            Without keys, the file must be a list.

    Raises:
        OSError: if the file is missing, forbidden or not a regular file.
        ValueError: if the file is compressed, truncated or damaged, or has another form.
        KeyError: if the object lacks one of the keys; raised after the last element.
        StorageError: if the file system fails.
    """
    if keys:
        yield from (element for _, element in iterate_json_lists(path, *keys))
        return
    with open_json_text(path) as file:
        yield from _Reader(file).elements()


def iterate_json_lists(path: str, *keys: str) -> Iterator[tuple[str, Any]]:
    """Yields (key, element) for each element of the lists at `keys` in a JSON object, in the order of the file.

    Takes the arguments of `iterate_json_list` and raises the same errors.
    """
    with open_json_text(path) as file:
        reader = _Reader(file)
        missing = list(keys)
        for key in reader.member_keys():
            if key in missing:
                missing.remove(key)
                yield from ((key, element) for element in reader.elements())
            else:
                reader.skip_value()
        if missing:
            raise KeyError(missing[0])


def read_json_members(path: str, *keys: str) -> dict[str, Any]:
    """Returns those members of a JSON object whose keys are given. Other members are not kept in memory.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the file is compressed, truncated or damaged, or is not a JSON object.
        StorageError: if the file system fails.
    """
    found = {}
    with open_json_text(path) as file:
        reader = _Reader(file)
        for key in reader.member_keys():
            if key in keys:
                found[key] = reader.member()
            else:
                reader.skip_value()
    return found


def open_json_text(path: str) -> io.TextIOWrapper:
    """Opens a UTF-8 text file, with or without a byte order mark; retries failed reads (`files.reading`).

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the first bytes show a compressed file, an archive, a table, an image or UTF-16.
    """
    check_is_text(path)
    return io.TextIOWrapper(open_for_reading(path), encoding="utf-8-sig")


@contextlib.contextmanager
def reading_as(path: str, form: str) -> Iterator[None]:
    """Converts errors of the `with` block, which reads a file, to a `ConfigError` that names the file and the expected
    form.

    Args:
        path: path of the file, for the message.
        form: description of the expected form, for the message.
    """
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"data: {path} cannot be read as {form}: {type(error).__name__}: {error}. Correct the path, or fetch it "
            "again."
        ) from error


class _Reader:
    """Parses a JSON text file piece by piece; keeps only a part of the text in memory."""

    def __init__(self, file: io.TextIOWrapper) -> None:
        self._file, self._decoder = file, json.JSONDecoder()
        self._buffer, self._position = "", 0

    def elements(self) -> Iterator[Any]:
        """Yields the elements of the list that starts at the current position."""
        self._take("[")
        while self._next(_BLANKS_AND_COMMAS) != "]":
            yield self.value()
        self._position += 1

    def member_keys(self) -> Iterator[str]:
        """Yields the keys of the object at the current position; the caller must read or skip each key's value."""
        self._take("{")
        while self._next(_BLANKS_AND_COMMAS) != "}":
            key = self.value()
            if not isinstance(key, str):
                raise ValueError(f"the key {key!r} of the object is not a string")
            self._take(":")
            yield key
        self._position += 1

    def skip_value(self) -> None:
        """Skips the value at the current position; skips a list or an object one element at a time."""
        match self._next():
            case "[":
                for _ in self.elements():
                    pass
            case "{":
                for _ in self.member_keys():
                    self.skip_value()
            case _:
                self.value()

    def member(self) -> Any:
        """Decodes and returns the value of an object member, at the current position.

        The limit of `_MAX_ELEMENT` characters applies to each element of a list, not to the whole list. It also applies
        to all other values.
        """
        return list(self.elements()) if self._next() == "[" else self.value()

    def value(self) -> Any:
        """Decodes and returns the value at the current position."""
        self._next()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._position)
                reason = ""
            except json.JSONDecodeError as error:
                value, end, reason = None, len(self._buffer), error.msg
            # A value at the end of the buffer may be incomplete: 12 may be the beginning of 123.
            if not reason and end < len(self._buffer):
                self._position = end
                return value
            check_json_size(self._buffer[self._position :], _MAX_ELEMENT)
            if not self._read_more():
                if reason:
                    raise ValueError(f"truncated or damaged: {reason}")
                self._position = end
                return value

    def _take(self, character: str) -> None:
        found = self._next()
        if found != character:
            raise ValueError(f"expected '{character}' and not {found!r}")
        self._position += 1

    def _next(self, blanks: re.Pattern[str] = _BLANKS) -> str:
        """Skips white space and returns the next character; the position stays at that character."""
        while True:
            match = blanks.match(self._buffer, self._position)
            self._position = match.end() if match else self._position
            if self._position < len(self._buffer):
                return self._buffer[self._position]
            if not self._read_more():
                raise ValueError("truncated")

    def _read_more(self) -> bool:
        """Appends the next part of the file to the buffer; returns False at the file's end.

        Removes the parsed text from the buffer. The new part is at least as long as the unparsed text in the buffer,
        unless the file ends.
        """
        more = self._file.read(max(_CHUNK, len(self._buffer) - self._position))
        self._buffer, self._position = self._buffer[self._position :] + more, 0
        return bool(more)
