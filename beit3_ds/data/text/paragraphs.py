"""Reads the paragraphs of text files: plain text or JSON, compressed or not.

In plain text, each line is a paragraph, and blank lines separate documents. In JSON, each object is a document, and the
lines of its `text` are paragraphs. Lines end with a newline, a carriage return, or a carriage return and a newline.
`formats` explains the two kinds of JSON files: JSON lines and JSON values.

Only one line or JSON value is in memory at a time. In plain text and JSON lines, lines of more than 16 MiB are skipped.
In a file of JSON values, a value of more than 32 Mi characters raises `ConfigError`, and a value of more than 16 Mi
characters may raise it.
"""

import io
import json
import math
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from beit3_ds.config import ConfigError
from beit3_ds.data.files.lines import skip_blank_lines, skip_line
from beit3_ds.data.files.reading import open_for_reading
from beit3_ds.data.text.decompression import DECOMPRESSION_ERRORS, open_decompressed
from beit3_ds.data.text.formats import TextFormat, find_text_format
from beit3_ds.data.text.json_values import iterate_json_values
from beit3_ds.data.text.validity import check_is_text
from beit3_ds.printing import printable
from beit3_ds.untrusted_json import check_json_size

_MAX_LINE_BYTES = 16 << 20
_CHUNK_BYTES = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLANK_PARTS = re.compile(rb"\r{3,}")
_SHOWN = 10


class TextPiece(NamedTuple):
    """Identifies a piece of a text file: the lines that start in a range of bytes."""

    path: str
    """Path of the text file."""
    start: int
    """Offset of the first byte of the range."""
    stop: int
    """Offset one past the last byte of the range. A compressed file or a file of JSON values has only one piece."""


class Paragraph(NamedTuple):
    """Holds one paragraph of a text file."""

    text: str
    """Text of the paragraph, without surrounding white space; not empty."""
    ends_document: bool
    """Whether the paragraph is the last one of its document."""


class BrokenLines:
    """Collects the broken lines of text files; raises `ConfigError` if there are too many.

    Attributes:
        lines: description of each broken line: file, line number and reason.
    """

    def __init__(self, budget: float) -> None:
        """Creates an empty collection that accepts at most `budget` broken lines."""
        self.lines: list[str] = []
        self._budget = budget

    def add(self, line: str) -> None:
        """Adds the description of one broken line.

        Raises:
            ConfigError: if there are now more broken lines than the budget allows; the message lists the first ten.
        """
        self.extend([line])

    def extend(self, lines: list[str]) -> None:
        """Adds the descriptions of several broken lines.

        Raises:
            ConfigError: if there are now more lines than the budget allows; the message lists the first ten.
        """
        self.lines.extend(lines)
        if len(self.lines) > self._budget:
            raise ConfigError(
                f"data: {len(self.lines)} lines of text cannot be read; data.max_broken_records="
                f"{self._budget} allows fewer. Repair the files (iconv converts to UTF-8) or raise it. The first "
                "of them:",
                *self.lines[:_SHOWN],
            )


def whole_file(path: str) -> TextPiece:
    """Returns the `TextPiece` that covers a whole file.

    Raises:
        ConfigError: if the file cannot be read, or is not a text file.
        StorageError: if the file system fails.
    """
    return cut_into_pieces(path, math.inf)[0]


def cut_into_pieces(path: str, piece_bytes: float) -> list[TextPiece]:
    """Divides a file into pieces of `piece_bytes` bytes. A file whose format requires reading from the start, such as a
    compressed file, is one piece.

    Raises:
        ConfigError: if the file cannot be read, or is not a text file.
        StorageError: if the file system fails.
    """
    text_format, size = find_text_format(path), os.path.getsize(path)
    if text_format.is_read_whole or size <= piece_bytes:
        return [TextPiece(path, 0, size)]
    step = int(piece_bytes)
    return [TextPiece(path, start, min(start + step, size)) for start in range(0, size, step)]


def read_paragraphs(piece: TextPiece, broken: BrokenLines) -> Iterator[Paragraph]:
    """Yields the paragraphs of a piece of a text file.

    Args:
        piece: the piece to read.
        broken: collects broken lines: too long, not UTF-8, not valid text (`check_is_text`), or not JSON in a file of
            JSON lines. Also collects JSON values without a valid string under `text`.

    Raises:
        ConfigError: if the file cannot be read or decompressed, a file of JSON values cannot be parsed, or too many
            lines or values are broken.
        StorageError: if the file system fails.
    """
    text_format = find_text_format(piece.path)
    try:
        with open_decompressed(piece.path, text_format.compression) as file:
            if text_format.kind == "json_values":
                yield from _paragraphs_of_values(file, piece.path, broken)
            else:
                yield from _paragraphs_of_lines(file, piece, text_format, broken)
    except DECOMPRESSION_ERRORS as error:
        raise ConfigError(f"data: {printable(piece.path)} cannot be read: {error}. Fetch it again.") from error


def _paragraphs_of_values(file: io.BufferedReader, path: str, broken: BrokenLines) -> Iterator[Paragraph]:
    values = iterate_json_values(io.TextIOWrapper(file, encoding="utf-8-sig"), _MAX_LINE_BYTES)
    number = 0
    try:
        for number, value in enumerate(values, 1):
            try:
                yield from _mark(_paragraphs_of_record(value))
            except ValueError as error:
                broken.add(f"{printable(path)}:{number}: {error}")
    except ValueError as error:  # an error of the file; errors of single values are counted above
        raise ConfigError(
            f"data: {printable(path)} cannot be read as JSON after value {number}: {error}. Repair it, or write one "
            "object per line (JSONL), where only the broken line is left out."
        ) from error


def _paragraphs_of_lines(
    file: io.BufferedReader, piece: TextPiece, text_format: TextFormat, broken: BrokenLines
) -> Iterator[Paragraph]:
    first = _find_first_line(file, piece)
    lines_before: int | None = None
    held: str | None = None  # a paragraph that may be the last one of its document
    is_plain = text_format.kind == "plain"
    for number, is_inside, part in _read_parts(file, first, math.inf if text_format.is_read_whole else piece.stop):
        if not is_inside and held is None:
            break
        try:
            line = _decode(part)
            if not is_plain:
                yield from _mark(_parse_json(line))
                continue
            text = line.strip()
            check_is_text(text)
        except ValueError as error:
            if not is_inside:  # the next piece counts it
                continue
            if lines_before is None:  # counted only when needed, because it reads the file up to the piece
                lines_before = _count_lines(piece.path, first)
            broken.add(f"{printable(piece.path)}:{lines_before + number}: {error}")
            continue
        if held is not None:
            yield Paragraph(held, ends_document=not text)
        held = (text or None) if is_inside else None
    if held is not None:
        yield Paragraph(held, ends_document=True)


def _mark(paragraphs: list[str]) -> Iterator[Paragraph]:
    """Yields the paragraphs of one document, with `ends_document` set for the last paragraph."""
    for number, paragraph in enumerate(paragraphs, 1):
        yield Paragraph(paragraph, ends_document=number == len(paragraphs))


def _parse_json(line: str) -> list[str]:
    if not line or line.isspace():
        return []
    try:
        check_json_size(line, len(line))
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    return _paragraphs_of_record(record)


def _paragraphs_of_record(record: object) -> list[str]:
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError("no JSON object with a string under 'text'")
    check_is_text(text)
    lines = text.replace("\r", "\n").split("\n")
    return [paragraph.strip() for paragraph in lines if paragraph and not paragraph.isspace()]


def _decode(line: bytes) -> str:
    if len(line) > _MAX_LINE_BYTES:
        raise ValueError(f"longer than {_MAX_LINE_BYTES >> 20} MiB")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start} of the line") from error


def _find_first_line(file: io.BufferedReader, piece: TextPiece) -> int:
    """Seeks to the first line that starts in the piece; returns the line's offset in bytes."""
    if piece.start == 0:
        return 0
    file.seek(piece.start - 1)  # a line starts at piece.start if the byte before is a newline
    return piece.start - 1 + skip_line(file, b" ")


def _read_parts(file: io.BufferedReader, position: int, stop: float) -> Iterator[tuple[int, bool, bytes]]:
    """Yields the parts of each line of a file; carriage returns separate the parts of a line.

    Blank parts may be left out. A line longer than `_MAX_LINE_BYTES` is truncated, and is yielded as one part.

    The file must already be at the byte offset `position`.

    Yields:
        For each part: the number of its line, whether the line starts before byte `stop`, and the bytes of the part.
            The line at `position` has number 1.
    """
    number = 0
    while line := file.readline(_MAX_LINE_BYTES + 1):
        number, length = number + 1, len(line)
        is_long = length > _MAX_LINE_BYTES
        if is_long:
            length += skip_line(file, line)
        elif position == 0:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        for part in [line] if is_long else _BLANK_PARTS.sub(b"\r\r", line.rstrip(b"\r\n")).split(b"\r"):
            yield number, position < stop, part
        position += length
        while line.isspace() and position < stop:
            num_lines, num_bytes = skip_blank_lines(file)
            number, position = number + num_lines, position + num_bytes
            if not num_bytes:
                break


def _count_lines(path: str, stop: int) -> int:
    """Counts the newlines before byte `stop` of an uncompressed file."""
    count = 0
    with open_for_reading(path) as file:
        while chunk := file.read(min(_CHUNK_BYTES, stop)):
            count += chunk.count(b"\n")
            stop -= len(chunk)
    return count
