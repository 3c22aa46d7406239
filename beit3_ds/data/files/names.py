"""Reads text files of bounded size with one name per line."""

from collections.abc import Iterator

from beit3_ds.data.files.json_lists import open_json_text
from beit3_ds.data.files.lines import iterate_lines

_MAX_CHARACTERS = 1 << 16
_MAX_LINES = 10_000_000


def iterate_names(path: str) -> Iterator[str]:
    """Yields the lines of a UTF-8 file, including blank lines.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the file is not UTF-8 text, has a line of more than 65,536 characters, or has more than ten
            million lines.
        StorageError: if the file system fails.
    """
    with open_json_text(path) as file:
        for number, line in enumerate(iterate_lines(file, _MAX_CHARACTERS), start=1):
            if len(line) > _MAX_CHARACTERS:
                raise ValueError(f"line {number} has more than {_MAX_CHARACTERS:,} characters")
            if number > _MAX_LINES:
                raise ValueError(f"it has more than {_MAX_LINES:,} lines")
            yield line
