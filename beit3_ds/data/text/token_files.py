"""Defines token files, which `beit3 prepare texts` writes and which a training run maps into memory.

A text file is divided into pieces, with one `.tokens` file per piece. All pieces share one `.borders` file per sequence
length. Every file name begins with the text file's name and a digest of the text file's path. The name of a `.tokens`
file also contains the byte offset at which the piece starts:

    text.txt-5f0c9a3e11d2.000000000000.tokens     tokens of the piece that starts at byte 0
    text.txt-5f0c9a3e11d2.000067108864.tokens     tokens of the next piece
    text.txt-5f0c9a3e11d2.length-128.borders      starts of the sequences of 128 tokens, over all pieces

A `.tokens` file contains the piece's token ids (uint16, or uint32 if the vocabulary exceeds 65536 ids), the number of
tokens per paragraph (uint32), and a footer. A `.borders` file contains the start of each sequence (int64), the text
file's total number of tokens (int64), and a footer. The start of a sequence is the index of its first token, counted
from the first token of the text file.

A footer is JSON, followed by the length of the JSON (8 bytes) and `BEIT3TOK`. All numbers are little-endian. Files are
written under a temporary name and then renamed.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from beit3_ds.atomic_file import atomic_write, bounded_name
from beit3_ds.config import ConfigError
from beit3_ds.data.files.descriptors import map_file
from beit3_ds.data.text.paragraphs import BrokenLines, TextPiece, read_paragraphs
from beit3_ds.data.text.tokenization import encode_paragraphs, token_dtype
from beit3_ds.printing import printable
from beit3_ds.regular_file import open_regular
from beit3_ds.tokenizers.text import TextTokenizer
from beit3_ds.untrusted_json import check_count, check_list, check_object, check_text, parse_untrusted_json

_MAGIC = b"BEIT3TOK"
_VERSION = 3  # version of the format, and of the rule that cuts sequences
_SUFFIX = ".tokens"
_MAX_FOOTER_BYTES = 1 << 26  # with the descriptions of many broken lines
COPY_NUMBERS = 1 << 18
"""Maximum count of numbers that are copied to a file at a time, to bound memory use."""
REDO = "Run `beit3 prepare texts CONFIG.json`: it does what is missing or out of date and keeps the rest."
"""Advice at the end of messages about missing, damaged or outdated token files."""


class TokenPiece(NamedTuple):
    """Describes a token file by the values in its footer."""

    path: Path
    """Path of the token file."""
    dtype: str
    """NumPy dtype of the ids, such as `<u2`."""
    num_tokens: int
    """Number of token ids in the file."""
    num_paragraphs: int
    """Number of paragraphs in the file."""
    tokenizer: str
    """Fingerprint of the text tokenizer that produced the ids."""
    document_separator: bool
    """Whether every document ends with EOS."""
    piece: TextPiece
    """Piece of the text file that was tokenized."""
    text_size: int
    """Size of the whole text file when it was tokenized, in bytes."""
    text_mtime_ns: int
    """Modification time of the text file when it was tokenized, in nanoseconds since 1970."""
    broken: tuple[str, ...]
    """Skipped lines, each with file, line number and reason."""

    def fits(self, text: os.stat_result) -> bool:
        """Returns whether the text file still has the size and modification time that the footer records."""
        return (self.text_size, self.text_mtime_ns) == (text.st_size, text.st_mtime_ns)

    def tokens(self, start: int = 0, stop: int | None = None) -> NDArray[np.generic]:
        """Memory-maps the token ids at the positions `start` to `stop` - 1; None for `stop` maps all ids from `start`
        on.
        """
        stop = self.num_tokens if stop is None else stop
        return map_array(self.path, self.dtype, start * np.dtype(self.dtype).itemsize, stop - start)

    def paragraph_lengths(self) -> NDArray[np.generic]:
        """Memory-maps the number of tokens per paragraph, (num_paragraphs,) uint32."""
        offset = _aligned(self.num_tokens * np.dtype(self.dtype).itemsize)
        return map_array(self.path, "<u4", offset, self.num_paragraphs)


def token_path(folder: Path, piece: TextPiece) -> Path:
    """Returns the path of a piece's token file."""
    return _piece_path(folder, piece.path, piece.start)


def write_tokens(
    folder: Path, piece: TextPiece, tokenizer: TextTokenizer, budget: int, document_separator: bool = True
) -> TokenPiece:
    """Tokenizes a piece of a text file and writes the token file, in bounded memory.

    Args:
        folder: folder of the token files.
        piece: piece of the text file.
        tokenizer: tokenizer that encodes the paragraphs.
        budget: maximum number of broken lines in the piece.
        document_separator: whether every document ends with EOS.

    Raises:
        ConfigError: if the text file cannot be read, or has more than `budget` broken lines in this piece.
    """
    path, broken, status = token_path(folder, piece), BrokenLines(budget), os.stat(piece.path)
    dtype = token_dtype(tokenizer.vocab_size).newbyteorder("<")
    num_tokens = num_paragraphs = 0
    with atomic_write(path) as file, atomic_write(path.with_suffix(".lengths"), keep=False) as lengths_file:
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
    return read_token_piece(path)


def read_token_piece(path: Path) -> TokenPiece:
    """Reads the footer of a token file.

    Raises:
        ConfigError: if the file is missing or damaged.
    """
    return _from_footer(path, read_footer(path))


def count_tokens(folder: Path, texts: Iterable[str]) -> int:
    """Returns the total number of tokens in the existing token files of the given text files.

    Raises:
        ConfigError: if a token file is damaged.
    """
    names = _names(folder)
    found = (name for text in texts for name in names.get(file_stem(text), ()))
    return sum(read_token_piece(folder / name).num_tokens for name in found)


def find_token_pieces(
    folder: Path, text: str, tokenizer: TextTokenizer, document_separator: bool = True
) -> list[TokenPiece]:
    """Returns all token files of a text file, in order; checks that they are complete and up to date.

    Raises:
        ConfigError: if a token file is missing or damaged, or does not match the text file, the tokenizer or
            `document_separator`.
    """
    status, end = os.stat(text), 0
    pieces: list[TokenPiece] = []
    # The end of each piece is the start of the next one, so the folder, which may be large, is never listed.
    while (not pieces or end < status.st_size) and (path := _piece_path(folder, text, end)).exists():
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
                f"data: {piece.path} was made when {text} had {piece.text_size} bytes and mtime_ns "
                f"{piece.text_mtime_ns}; now they are {status.st_size} and {status.st_mtime_ns}. {REDO}"
            )
        if pieces and piece.piece.stop <= end:
            break  # the next piece would be this empty piece again
        pieces.append(piece)
        end = piece.piece.stop
    if not pieces or end != status.st_size:
        raise ConfigError(
            f"data: {folder} has no tokens of {text} from byte {end} of {status.st_size}; they are not prepared, "
            f"or not all shares have finished. {REDO}"
        )
    return pieces


def remove_other_pieces(folder: Path, texts: Iterable[Sequence[TextPiece]]) -> None:
    """Deletes the token files of pieces that no longer exist, for example after a text file has shrunk.

    Args:
        folder: folder of the token files.
        texts: all current pieces of each text file.
    """
    names = _names(folder)
    for pieces in texts:
        kept = {token_path(folder, piece).name for piece in pieces}
        for name in names.get(file_stem(pieces[0].path), ()):
            if name not in kept:
                (folder / name).unlink(missing_ok=True)


def _from_footer(path: Path, footer: dict[str, Any]) -> TokenPiece:
    try:
        text, start, stop = check_list(footer["source"], 3)
        piece = TokenPiece(
            path=path,
            dtype=_check_dtype(footer["dtype"]),
            num_tokens=check_count(footer["num_tokens"]),
            num_paragraphs=check_count(footer["num_paragraphs"]),
            tokenizer=check_text(footer["tokenizer"]),
            document_separator=footer["document_separator"] is True,
            piece=TextPiece(check_text(text), check_count(start), check_count(stop)),
            text_size=check_count(footer["source_size"]),
            text_mtime_ns=check_count(footer["source_mtime_ns"]),
            broken=tuple(printable(check_text(line)) for line in check_list(footer["broken"])),
        )
        num_bytes = piece.num_tokens * np.dtype(piece.dtype).itemsize
        if _aligned(num_bytes) + 4 * piece.num_paragraphs != footer["offset"]:
            raise ValueError("its sizes do not fit the file")
        return piece
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(path, error) from error


def _check_dtype(name: Any) -> str:
    if name not in ("<u2", "<u4"):
        raise ValueError(f"{str(name)[:20]!r} is not a dtype of ids")
    return str(name)


def file_stem(text: str) -> str:
    """Returns the common prefix of the names of a text file's `.tokens` and `.borders` files."""
    return f"{bounded_name(Path(text).name)}-{hashlib.blake2b(os.fsencode(text), digest_size=6).hexdigest()}"


def _piece_path(folder: Path, text: str, start: int) -> Path:
    return folder / f"{file_stem(text)}.{start:012d}{_SUFFIX}"


def _names(folder: Path) -> dict[str, list[str]]:
    """Returns the names of all token files in a folder, grouped by the `file_stem` of their text file."""
    names: dict[str, list[str]] = {}
    if folder.is_dir():
        for entry in os.scandir(folder):
            if entry.name.endswith(_SUFFIX):
                names.setdefault(entry.name.rsplit(".", 2)[0], []).append(entry.name)
    return names


def map_array(path: Path, dtype: str, offset: int, count: int) -> NDArray[np.generic]:
    """Memory-maps `count` numbers of type `dtype` from a file, from byte `offset` on."""
    return map_file(str(path), offset + count * np.dtype(dtype).itemsize)[offset:].view(dtype)


def _aligned(offset: int) -> int:
    return -(-offset // 4) * 4


def write_footer(file: BinaryIO, footer: dict[str, Any]) -> None:
    """Writes a footer at the current position of a file."""
    data = json.dumps({"version": _VERSION, **footer}).encode()
    file.write(data + len(data).to_bytes(8, "little") + _MAGIC)


def read_footer(path: Path) -> dict[str, Any]:
    """Reads the footer of a file; adds the footer's position in the file as `offset`.

    Raises:
        ConfigError: if the file is missing or damaged, or has another format version.
    """
    try:
        with open(open_regular(path), "rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 16))
            tail = file.read()
            length = int.from_bytes(tail[:8], "little")
            if tail[8:] != _MAGIC or length > min(end - 16, _MAX_FOOTER_BYTES):
                raise ValueError("it has no footer")
            offset = file.seek(end - 16 - length)
            footer = check_object(parse_untrusted_json(file.read(length), _MAX_FOOTER_BYTES))
            if footer.pop("version") != _VERSION:
                raise ValueError(f"it was not written by version {_VERSION} of the format")
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(path, error) from error
    return footer | {"offset": offset}


def _damaged(path: Path, error: Exception) -> ConfigError:
    reason = f"its footer has no {error}" if isinstance(error, KeyError) else error
    return ConfigError(f"data: {path} cannot be read: {reason}. {REDO}")
