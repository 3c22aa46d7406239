"""Paragraphs of text files, streamed: plain text or JSONL, as it is or compressed with gzip or Zstandard.

| name | what a line is |
|---|---|
| `*.jsonl` | a JSON object; its `text` is a document, of which every line is a paragraph |
| any other | a paragraph; blank lines, between documents or paragraphs, carry no meaning |

Either may end in `.gz` or `.zst`. At most one line is in memory, and a line of more than 16 MiB is left out, so memory
is bounded whatever the file. Lines end with a newline byte; a carriage return before it is white space.
"""

import gzip
import io
import json
import math
import os
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, cast

import zstandard

from beit3_ds.config import ConfigError

_MAX_LINE_BYTES = 16 << 20
_CHUNK_BYTES = 1 << 20
_COMPRESSED_BYTES = 8 << 10  # zstandard gives out at once all that they hold
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SHOWN = 10


class TextPiece(NamedTuple):
    """The lines of a file that start in a range of its bytes."""

    path: str
    """The file."""
    start: int
    """First byte."""
    stop: int
    """One past the last byte. A compressed file can only be read whole: its piece ends with the file."""


class BrokenLines:
    """Lines that were left out, counted against a budget.

    Attributes:
        lines: file, line number and reason of each.
    """

    def __init__(self, budget: float) -> None:
        """Allows for `budget` lines."""
        self.lines: list[str] = []
        self._budget = budget

    def add(self, line: str) -> None:
        """Counts one line.

        Raises:
            ConfigError: with the first lines, if there are now more than the budget.
        """
        self.extend([line])

    def extend(self, lines: list[str]) -> None:
        """Counts several lines; raises as `add`."""
        self.lines.extend(lines)
        if len(self.lines) > self._budget:
            shown = "\n  ".join(self.lines[:_SHOWN])
            raise ConfigError(
                f"data: {len(self.lines)} lines of text cannot be read; data.max_broken_records="
                f"{self._budget} allows for fewer. Repair the files (iconv converts to UTF-8) or raise it. The first "
                f"of them:\n  {shown}"
            )


def whole_file(path: str) -> TextPiece:
    """The piece that is all of a file.

    Raises:
        ConfigError: if the file cannot be read.
    """
    return cut_into_pieces(path, math.inf)[0]


def cut_into_pieces(path: str, piece_bytes: float) -> list[TextPiece]:
    """Cuts a file into pieces of `piece_bytes` that can be read apart; a compressed file is one piece.

    Raises:
        ConfigError: if the file cannot be read.
    """
    try:
        size = os.path.getsize(path)
    except OSError as error:
        raise ConfigError(f"data: {path} cannot be read: {error}.") from error
    if _is_compressed(path) or size <= piece_bytes:
        return [TextPiece(path, 0, size)]
    step = int(piece_bytes)
    return [TextPiece(path, start, min(start + step, size)) for start in range(0, size, step)]


def read_paragraphs(piece: TextPiece, broken: BrokenLines) -> Iterator[str]:
    """Yields the paragraphs of a piece, without blank ones and without white space around them.

    Args:
        piece: what to read.
        broken: where lines that are not UTF-8, no JSON object with a `text`, or too long are counted.

    Raises:
        ConfigError: if the file cannot be read or decompressed, or the budget of broken lines is used up.
    """
    parse = _parse_json if _is_json(piece.path) else _parse_plain
    try:
        with _open(piece.path) as file:
            first = _find_first_line(file, piece)
            lines_before: int | None = None
            for number, line in enumerate(_read_lines(file, piece, first), 1):
                try:
                    yield from parse(line)
                except ValueError as error:
                    if lines_before is None:  # seldom needed, and reads the file up to the piece
                        lines_before = _count_lines(piece.path, first)
                    broken.add(f"{piece.path}:{lines_before + number}: {error}")
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise ConfigError(f"data: {piece.path} cannot be read: {error}. Fetch it again.") from error


def _parse_plain(line: bytes) -> list[str]:
    text = _decode(line).strip()
    return [text] if text else []


def _parse_json(line: bytes) -> list[str]:
    decoded = _decode(line)
    if not decoded or decoded.isspace():
        return []
    try:
        record = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError("no JSON object with a string under 'text'")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # "\ud800" is valid JSON and no valid text
        raise ValueError(f"half a surrogate pair at character {error.start} of 'text'") from error
    return [paragraph.strip() for paragraph in text.split("\n") if paragraph and not paragraph.isspace()]


def _decode(line: bytes) -> str:
    if len(line) > _MAX_LINE_BYTES:
        raise ValueError(f"longer than {_MAX_LINE_BYTES >> 20} MiB")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start} of the line") from error


def _find_first_line(file: BinaryIO, piece: TextPiece) -> int:
    """Moves to the first line that starts in the piece and returns where that is."""
    if piece.start == 0:
        return 0
    file.seek(piece.start - 1)  # the byte before may be the newline that makes piece.start a start of a line
    return piece.start - 1 + _skip_line(file)


def _read_lines(file: BinaryIO, piece: TextPiece, position: int) -> Iterator[bytes]:
    """Yields the lines that start between `position` and the end of the piece; one too long is yielded cut."""
    stop = math.inf if _is_compressed(piece.path) else piece.stop
    while position < stop and (line := file.readline(_MAX_LINE_BYTES + 1)):
        length = len(line)
        if length > _MAX_LINE_BYTES and not line.endswith(b"\n"):
            length += _skip_line(file)
        yield line.removeprefix(_BYTE_ORDER_MARK) if position == 0 else line
        position += length


def _skip_line(file: BinaryIO) -> int:
    """Reads to the end of the line in bounded memory and returns the number of bytes."""
    skipped = 0
    while part := file.readline(_CHUNK_BYTES):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


def _count_lines(path: str, stop: int) -> int:
    """The lines that end before byte `stop`; 0 for a compressed file, whose one piece starts at 0."""
    count = 0
    with open(path, "rb") as file:
        while chunk := file.read(min(_CHUNK_BYTES, stop)):
            count += chunk.count(b"\n")
            stop -= len(chunk)
    return count


def _is_compressed(path: str) -> bool:
    return path.endswith((".gz", ".zst"))


def _is_json(path: str) -> bool:
    return path.removesuffix(".gz").removesuffix(".zst").endswith(".jsonl")


def _open(path: str) -> BinaryIO:
    if path.endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.endswith(".zst"):
        return cast(BinaryIO, io.BufferedReader(_ZstandardFrames(path), _CHUNK_BYTES))
    return open(path, "rb", buffering=_CHUNK_BYTES)


class _ZstandardFrames(io.RawIOBase):
    """All frames of a .zst file; a file that ends within a frame is an error, which zstandard's own reader hides."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "rb")  # noqa: SIM115, closed by close()
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._inside = False
        self._compressed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            self._compressed = self._compressed or self._file.read(_COMPRESSED_BYTES)
            if not self._compressed:
                if self._inside:
                    raise EOFError("it ends within a Zstandard frame")
                return 0
            self._ready = memoryview(self._frame.decompress(self._compressed))
            self._inside, self._compressed = not self._frame.eof, self._frame.unused_data
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()
