"""Reads the JSON values of a file one at a time; the elements of a list at the top level count as separate values."""

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

from beit3_ds.untrusted_json import check_json_size

_CHUNK = 1 << 20
_BLANKS = re.compile(r"[ \t\r\n]*")
_BLANKS_AND_COMMAS = re.compile(r"[ \t\r\n,]*")


def iterate_json_values(file: TextIO, max_characters: int) -> Iterator[Any]:
    """Yields the JSON values of a file; yields the elements of a list at the top level instead of the list.

    Raises:
        ValueError: if the file is truncated or damaged, or a value has more than `max_characters` characters.
    """
    decoder = json.JSONDecoder()
    buffer, position, is_in_list = "", 0, False
    while True:
        blanks = (_BLANKS_AND_COMMAS if is_in_list else _BLANKS).match(buffer, position)
        position = blanks.end() if blanks else position
        if position < len(buffer) and buffer[position] == ("]" if is_in_list else "["):
            position, is_in_list = position + 1, not is_in_list
            continue
        reason, value, end, is_parsed = "truncated within a list", None, len(buffer), False
        if position < len(buffer):
            try:
                value, end = decoder.raw_decode(buffer, position)
                is_parsed = True
            except (json.JSONDecodeError, RecursionError) as error:
                reason = f"not JSON: {getattr(error, 'msg', 'nested too deeply')}"
        if end < len(buffer):  # at the end of the buffer, the value may continue in the file
            yield value
            position = end
            continue
        # Reading twice as much each time avoids quadratic time for a long value.
        if not (more := file.read(max(_CHUNK, len(buffer) - position))):
            if is_parsed:
                yield value
            elif position < len(buffer):
                raise ValueError(reason)
            if is_in_list:
                raise ValueError("truncated within a list")
            return
        if len(buffer) - position > max_characters:
            raise ValueError(f"a value of more than {max_characters} characters, or {reason}")
        buffer, position = buffer[position:] + more, 0
        check_json_size(buffer, 2 * len(buffer))
