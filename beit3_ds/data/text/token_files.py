"""Token files: what `beit3 prepare texts` writes, and how training reads it without loading it.

The tokens of a source file lie in one file for each of its pieces, named after the source and a digest of its path:

    text.txt-5f0c9a3e11d2.000000000000.tokens     the piece that starts at byte 0
    text.txt-5f0c9a3e11d2.000067108864.tokens     the next one
    text.txt-5f0c9a3e11d2.length-128.borders      where the sequences of 128 tokens start, for all pieces together

A `.tokens` file is all ids (uint16, or uint32 with more than 65536 of them), the tokens of each paragraph (uint32),
and a footer; a `.borders` file is where sequences start, counted in tokens of the source, and the number of its tokens
(int64), and a footer. A footer is JSON, its length (8 bytes) and `BEIT3TOK`; numbers are little-endian. A file is
written aside and renamed, so one that is there is whole.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from beit3_ds.atomic_file import bounded_name, written_aside
from beit3_ds.config import ConfigError
from beit3_ds.data.files.descriptors import map_file
from beit3_ds.data.text.paragraphs import BrokenLines, TextPiece, read_paragraphs
from beit3_ds.data.text.tokenization import encode_paragraphs, token_dtype
from beit3_ds.tokenizers.text import TextTokenizer

_MAGIC = b"BEIT3TOK"
_VERSION = 3  # of the format and of the rule that cuts sequences
_SUFFIX = ".tokens"
COPY_NUMBERS = 1 << 18
REDO = "Run `beit3 prepare texts CONFIG.json`: it does what is missing or out of date and keeps the rest."


class TokenPiece(NamedTuple):
    """A token file and what its footer says."""

    path: Path
    """The file."""
    dtype: str
    """Type of the ids."""
    num_tokens: int
    """Ids in it."""
    num_paragraphs: int
    """Paragraphs in it."""
    tokenizer: str
    """Fingerprint of the tokenizer that made them."""
    document_separator: bool
    """Whether every document ends with EOS."""
    source: TextPiece
    """What was read."""
    source_size: int
    """Bytes of the whole source file at that time."""
    source_mtime_ns: int
    """When the source file was last changed then, in nanoseconds since 1970."""
    broken: tuple[str, ...]
    """Lines that were left out: file, line number and reason."""

    def fits(self, source: os.stat_result) -> bool:
        """Whether the source file is still as it was, by its size and modification time."""
        return (self.source_size, self.source_mtime_ns) == (source.st_size, source.st_mtime_ns)

    def tokens(self, start: int = 0, stop: int | None = None) -> NDArray[np.generic]:
        """The ids from `start` to `stop`, (stop - start,), memory-mapped."""
        stop = self.num_tokens if stop is None else stop
        return map_array(self.path, self.dtype, start * np.dtype(self.dtype).itemsize, stop - start)

    def paragraph_lengths(self) -> NDArray[np.generic]:
        """Tokens of each paragraph, (num_paragraphs,) uint32, memory-mapped."""
        offset = _aligned(self.num_tokens * np.dtype(self.dtype).itemsize)
        return map_array(self.path, "<u4", offset, self.num_paragraphs)


def token_path(folder: Path, piece: TextPiece) -> Path:
    """Where the tokens of a piece lie. The digest of the path, as the config has it, parts sources of one name."""
    return _piece_path(folder, piece.path, piece.start)


def write_tokens(
    folder: Path, piece: TextPiece, tokenizer: TextTokenizer, budget: int, document_separator: bool = True
) -> TokenPiece:
    """Tokenizes a piece into its token file, in bounded memory.

    Raises:
        ConfigError: if the source cannot be read, or more than `budget` of its lines are broken.
    """
    path, broken, status = token_path(folder, piece), BrokenLines(budget), os.stat(piece.path)
    dtype = token_dtype(tokenizer.vocab_size).newbyteorder("<")
    num_tokens = num_paragraphs = 0
    with written_aside(path) as file, written_aside(path.with_suffix(".lengths"), keep=False) as lengths_file:
        for ids, lengths in encode_paragraphs(read_paragraphs(piece, broken), tokenizer, document_separator):
            file.write(ids.astype(dtype, copy=False).data)
            lengths_file.write(lengths.astype("<u4").data)
            num_tokens += len(ids)
            num_paragraphs += len(lengths)
        file.write(bytes(_aligned(file.tell()) - file.tell()))
        lengths_file.seek(0)
        while chunk := lengths_file.read(4 * COPY_NUMBERS):
            file.write(chunk)
        footer = {
            "dtype": dtype.str,
            "num_tokens": num_tokens,
            "num_paragraphs": num_paragraphs,
            "tokenizer": tokenizer.fingerprint,
            "document_separator": document_separator,
            "source": piece,
            "source_size": status.st_size,
            "source_mtime_ns": status.st_mtime_ns,
            "broken": broken.lines,
        }
        write_footer(file, footer)
    return TokenPiece(path, **footer | {"broken": tuple(broken.lines)})  # type: ignore[arg-type]


def read_token_piece(path: Path) -> TokenPiece:
    """Reads the footer of a token file.

    Raises:
        ConfigError: if it is damaged.
    """
    footer = read_footer(path)
    return TokenPiece(path, **footer | {"source": TextPiece(*footer["source"]), "broken": tuple(footer["broken"])})


def count_tokens(folder: Path, sources: Iterable[str]) -> int:
    """Counts the tokens of source files in the token files that exist so far.

    Raises:
        ConfigError: if one of them is damaged.
    """
    names = _names(folder)
    found = (name for source in sources for name in names.get(file_stem(source), ()))
    return sum(read_token_piece(folder / name).num_tokens for name in found)


def find_token_pieces(
    folder: Path, source: str, tokenizer: TextTokenizer, document_separator: bool = True
) -> list[TokenPiece]:
    """The token files of a source file, in the order of its bytes, checked to be all and up to date.

    Raises:
        ConfigError: naming the file that is missing, damaged, or older than the source or the tokenizer.
    """
    status, end = os.stat(source), 0
    pieces: list[TokenPiece] = []
    # Each piece says where the next one starts, so the folder with the pieces of all sources is never listed.
    while (not pieces or end < status.st_size) and (path := _piece_path(folder, source, end)).exists():
        piece = read_token_piece(path)
        if piece.tokenizer != tokenizer.fingerprint:
            raise ConfigError(f"data: {piece.path} was made with another text tokenizer. {REDO}")
        if piece.document_separator != document_separator:
            raise ConfigError(
                f"data: {piece.path} was made with document_separator={piece.document_separator}, the config has "
                f"{document_separator}. {REDO}"
            )
        if not piece.fits(status):
            raise ConfigError(
                f"data: {piece.path} was made when {source} had {piece.source_size} bytes and mtime_ns "
                f"{piece.source_mtime_ns}; now they are {status.st_size} and {status.st_mtime_ns}. {REDO}"
            )
        if pieces and piece.source.stop <= end:
            break  # it would follow itself
        pieces.append(piece)
        end = piece.source.stop
    if not pieces or end != status.st_size:
        raise ConfigError(
            f"data: {folder} holds no tokens of {source} from byte {end} of {status.st_size}; they are not prepared, "
            f"or not all parts have ended. {REDO}"
        )
    return pieces


def remove_other_pieces(folder: Path, sources: Iterable[Sequence[TextPiece]]) -> None:
    """Deletes token files of sources whose bytes match no piece, left from when a source was larger."""
    names = _names(folder)
    for pieces in sources:
        kept = {token_path(folder, piece).name for piece in pieces}
        for name in names.get(file_stem(pieces[0].path), ()):
            if name not in kept:
                (folder / name).unlink(missing_ok=True)


def file_stem(source: str) -> str:
    return f"{bounded_name(Path(source).name)}-{hashlib.blake2b(os.fsencode(source), digest_size=6).hexdigest()}"


def _piece_path(folder: Path, source: str, start: int) -> Path:
    return folder / f"{file_stem(source)}.{start:012d}{_SUFFIX}"


def _names(folder: Path) -> dict[str, list[str]]:
    """Returns the names of all token files, by the stem that the files of one source share."""
    names: dict[str, list[str]] = {}
    if folder.is_dir():
        for entry in os.scandir(folder):
            if entry.name.endswith(_SUFFIX):
                names.setdefault(entry.name.rsplit(".", 2)[0], []).append(entry.name)
    return names


def map_array(path: Path, dtype: str, offset: int, count: int) -> NDArray[np.generic]:
    return map_file(str(path), offset + count * np.dtype(dtype).itemsize)[offset:].view(dtype)


def _aligned(offset: int) -> int:
    return -(-offset // 4) * 4


def write_footer(file: BinaryIO, footer: dict[str, Any]) -> None:
    data = json.dumps({"version": _VERSION, **footer}).encode()
    file.write(data + len(data).to_bytes(8, "little") + _MAGIC)


def read_footer(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 16))
            tail = file.read()
            length = int.from_bytes(tail[:8], "little")
            if tail[8:] != _MAGIC or length > end - 16:
                raise ValueError("it has no footer")
            file.seek(end - 16 - length)
            footer = json.loads(file.read(length))
            if footer.pop("version") != _VERSION:
                raise ValueError(f"it was not written by version {_VERSION} of the format")
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"data: {path} cannot be read: {error}. {REDO}") from error
    return dict(footer)
