"""Detects the format of a text file from its name and its first bytes.

| name, in lower or upper case | content |
|---|---|
| `*.jsonl`, `*.ndjson`, `*.jsonlines`, `*.ldjson` | JSON values if the file starts with `[`, else JSON lines |
| `*.json` | JSON values if the file starts with `[` or the first line is not whole JSON, else JSON lines |
| tables, markup, documents, archives, images and others in `_OTHERS` | unsupported |
| any other name | plain text |

Compressed files of each format end with `.gz`, `.gzip`, `.zst` or `.zstd`. JSON lines have one object per line. JSON
values are objects that follow one another or are elements of lists; an object may span several lines.
"""

import json
import os
import re
from typing import Literal, NamedTuple

from beit3_ds.config import ConfigError
from beit3_ds.data.files.gaps import check_has_no_gap
from beit3_ds.data.files.kinds import IMAGE_EXTENSIONS, UNREAD_IMAGE_EXTENSIONS, kind_of_bytes
from beit3_ds.data.text.decompression import DECOMPRESSION_ERRORS, Compression, open_decompressed
from beit3_ds.printing import printable

_JSON_LINES = (".jsonl", ".ndjson", ".jsonlines", ".ldjson")
_GZIP, _ZSTANDARD = (".gz", ".gzip"), (".zst", ".zstd")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_KEY_TEXT = re.compile(r'[{,]\s*"text"\s*:\s*"')
_HEAD_BYTES = 1 << 16

_TO_JSONL = 'write the column of texts as JSONL, one {"text": ...} per line'
_OTHERS = {
    **dict.fromkeys((".csv", ".tsv", ".psv"), f"is a table: {_TO_JSONL}"),
    **dict.fromkeys((".parquet", ".arrow", ".feather", ".orc", ".avro"), f"is a binary table: {_TO_JSONL}"),
    **dict.fromkeys((".xls", ".xlsx", ".ods", ".sqlite", ".db"), f"is a binary table: {_TO_JSONL}"),
    **dict.fromkeys((".html", ".htm", ".xml", ".xhtml", ".rtf", ".tex"), "is markup: extract its text"),
    **dict.fromkeys((".pdf", ".doc", ".docx", ".odt", ".epub", ".ps"), "is a document: extract its text"),
    **dict.fromkeys((".tar", ".tgz", ".zip", ".7z", ".rar"), "is an archive: unpack it"),
    **dict.fromkeys((".bz2", ".xz", ".lz4", ".lzma", ".br", ".z"), "is compressed: use gzip or Zstandard"),
    **dict.fromkeys((".npy", ".npz", ".bin", ".pt", ".pkl", ".h5", ".hdf5", ".safetensors", ".spm"), "is not text"),
    **dict.fromkeys((f".{name}" for name in (*IMAGE_EXTENSIONS, *UNREAD_IMAGE_EXTENSIONS)), "is an image"),
    **dict.fromkeys((".mp3", ".mp4", ".wav", ".flac", ".webm", ".mkv"), "is not text"),
}


class TextFormat(NamedTuple):
    """Holds the format and the compression of a text file."""

    kind: Literal["plain", "json_lines", "json_values"]
    """Format of the decompressed content; the docstring of this module describes each format."""
    compression: Compression
    """Compression of the file; empty if the file is not compressed."""

    @property
    def is_read_whole(self) -> bool:
        """Returns whether the file must be read from its beginning and cannot be divided into pieces."""
        return bool(self.compression) or self.kind == "json_values"


def find_text_format(path: str) -> TextFormat:
    """Detects the format of a text file from the file's name and first bytes.

    Raises:
        ConfigError: if the file has an unsupported format, or cannot be opened.
        StorageError: if the file system fails.
    """
    compression, extension = _split_name(path)
    if extension in _OTHERS:
        raise ConfigError(f"data: {printable(path)} {_OTHERS[extension]}, or leave it out of data.texts.")
    try:
        check_has_no_gap(path)
        with open_decompressed(path, compression) as file:
            head = file.read(_HEAD_BYTES)
    except IsADirectoryError:
        pattern = printable(os.path.join(path, "*.txt"))
        raise ConfigError(f"data: {printable(path)} is a folder. Name its files, for example {pattern}.") from None
    except (*DECOMPRESSION_ERRORS, ValueError) as error:
        raise ConfigError(f"data: {printable(path)} cannot be read: {error}. Fetch it again.") from error
    if kind := kind_of_bytes(head):
        advice = "Convert it with iconv" if "UTF" in kind else "Give it the name of its format, or leave it out"
        raise ConfigError(f"data: {printable(path)} holds {kind}, not UTF-8 text. {advice}.")
    if extension != ".json" and extension not in _JSON_LINES:
        if _starts_with_record(head):
            raise ConfigError(
                f"data: {printable(path)} holds JSON objects with 'text'. Name it *.jsonl; otherwise every line "
                "is read as text, braces and keys included."
            )
        return TextFormat("plain", compression)
    return TextFormat(_kind_of_json(head, extension, is_whole=len(head) < _HEAD_BYTES), compression)


def _split_name(path: str) -> tuple[Compression, str]:
    """Returns the compression and the extension of a file name: `a.txt.gz` gives `gzip` and `.txt`."""
    stem, extension = os.path.splitext(path.lower())
    if extension in _GZIP:
        return "gzip", os.path.splitext(stem)[1]
    if extension in _ZSTANDARD:
        return "zstandard", os.path.splitext(stem)[1]
    return "", extension


def _kind_of_json(head: bytes, extension: str, is_whole: bool) -> Literal["json_lines", "json_values"]:
    head = head.removeprefix(_BYTE_ORDER_MARK).lstrip()
    if head.startswith(b"["):
        return "json_values"
    line, newline, _ = head.partition(b"\n")
    # If the line is longer than the bytes that were read, it may or may not be one value.
    if extension in _JSON_LINES or not (newline or is_whole):
        return "json_lines"
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return "json_values"
    return "json_lines"


def _starts_with_record(head: bytes) -> bool:
    """Returns whether a file starts with a JSON object that has a string under `text`.

    The object may also be the first element of a list.
    """
    text = head.removeprefix(_BYTE_ORDER_MARK).decode("utf-8", "ignore").lstrip()
    text = text.removeprefix("[").lstrip()
    if not text.startswith("{"):
        return False
    try:
        record, _ = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):  # not JSON, or longer than `head`
        return len(head) == _HEAD_BYTES and _KEY_TEXT.search(text) is not None
    return isinstance(record, dict) and isinstance(record.get("text"), str)
