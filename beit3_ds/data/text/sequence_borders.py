"""Sequences of a prepared text: where they start, and how they are read from the token files."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beit3_ds.atomic_file import written_aside
from beit3_ds.config import ConfigError
from beit3_ds.data.files.reading import read_with_retries, storage_error
from beit3_ds.data.text.sentences import ParagraphCutter
from beit3_ds.data.text.token_files import (
    COPY_NUMBERS,
    REDO,
    TokenPiece,
    file_stem,
    find_token_pieces,
    map_array,
    read_footer,
    write_footer,
)
from beit3_ds.data.text.tokenization import TokenizedParagraphs, sequence_starts
from beit3_ds.tokenizers.text import TextTokenizer

_BORDERS = -1  # number of the borders' map among those of pieces
_CHUNK_TOKENS = 1 << 20


def write_borders(
    folder: Path, source: str, pieces: Sequence[TokenPiece], length: int, cutter: ParagraphCutter
) -> None:
    """Writes where the sequences of at most `length` tokens, BOS and EOS included, start, unless that is done."""
    path = _borders_path(folder, source, length)
    fingerprint = _fingerprint(pieces)
    with suppress(ConfigError):  # missing or damaged
        if read_footer(path)["pieces"] == fingerprint:
            return
    total = sum(piece.num_tokens for piece in pieces)
    starts = chain(sequence_starts(_chunks(pieces), length - 2, cutter), [total])
    count = 0
    with written_aside(path) as file:
        while len(chunk := np.fromiter(islice(starts, COPY_NUMBERS), dtype="<i8")):
            file.write(chunk.tobytes())
            count += len(chunk)
        write_footer(file, {"count": count, "pieces": fingerprint})


class PreparedText:
    """The sequences of one source file, read from its token files.

    Nothing is loaded: ids and borders are mapped at their first use, so all processes of a machine share the page
    cache. Maps keep no file open. A pickled copy maps the files again.
    """

    def __init__(
        self, folder: Path, source: str, tokenizer: TextTokenizer, length: int, document_separator: bool = True
    ) -> None:
        """Opens the files and reads their footers.

        Args:
            folder: folder of the token files.
            source: the source file, by its path in the config.
            tokenizer: tokenizer that must have made the token files.
            length: most tokens of a sequence, BOS and EOS included.
            document_separator: setting with which the token files must have been made.

        Raises:
            ConfigError: naming the file that is missing, damaged or out of date.
        """
        self._pieces = find_token_pieces(folder, source, tokenizer, document_separator)
        self.broken = tuple(line for piece in self._pieces for line in piece.broken)
        self._borders_path = _borders_path(folder, source, length)
        if not self._borders_path.exists():
            raise ConfigError(
                f"data: {self._borders_path} is missing: {source} is tokenized, but not cut into sequences of "
                f"data.text_length={length} tokens. {REDO}"
            )
        footer = read_footer(self._borders_path)
        if footer["pieces"] != _fingerprint(self._pieces):
            raise ConfigError(f"data: {self._borders_path} is older than the token files beside it. {REDO}")
        self._num_borders: int = footer["count"]
        self._piece_starts = np.cumsum([0, *(piece.num_tokens for piece in self._pieces)])
        self._maps: dict[int, NDArray[np.generic]] = {}

    def __len__(self) -> int:
        """Sequences in the source."""
        return self._num_borders - 1

    def ids(self, index: int) -> NDArray[np.generic]:
        """Reads the ids of a sequence, without BOS; the last one is EOS if a document ends there.

        Raises:
            StorageError: if a file cannot be mapped. A file that fails later, when its map is read, ends the process.
        """
        start, stop = (int(border) for border in self._borders()[index : index + 2])
        parts = []
        number = int(np.searchsorted(self._piece_starts, start, side="right")) - 1
        while start < stop:
            first = int(self._piece_starts[number])
            part = self._tokens(number)[start - first : stop - first]
            parts.append(part)
            start += len(part)
            number += 1
        return np.concatenate(parts)

    def _borders(self) -> NDArray[np.generic]:
        if _BORDERS not in self._maps:
            path, count = self._borders_path, self._num_borders
            self._maps[_BORDERS] = _map_with_retries(path, lambda: map_array(path, "<i8", 0, count))
        return self._maps[_BORDERS]

    def _tokens(self, number: int) -> NDArray[np.generic]:
        if number not in self._maps:
            piece = self._pieces[number]
            self._maps[number] = _map_with_retries(piece.path, piece.tokens)
        return self._maps[number]

    def __getstate__(self) -> dict[str, Any]:
        # NumPy would pickle a map as a copy of all it shows.
        return vars(self) | {"_maps": {}}


def _map_with_retries(path: Path, open_map: Callable[[], NDArray[np.generic]]) -> NDArray[np.generic]:
    """Maps a file that existed when the run started; if it no longer can be mapped, its storage is at fault."""
    try:
        return read_with_retries(open_map, str(path), file_errors=frozenset())
    except OSError as error:  # an error without a number: the file was truncated
        raise storage_error(str(path), error, attempts=1) from error


def _borders_path(folder: Path, source: str, length: int) -> Path:
    return folder / f"{file_stem(source)}.length-{length}.borders"


def _fingerprint(pieces: Sequence[TokenPiece]) -> str:
    """Digest of what borders depend on beside the length: which tokens there are."""
    facts = [
        (piece.tokenizer, piece.document_separator, piece.source.start, piece.source_size, piece.source_mtime_ns)
        for piece in pieces
    ]
    return hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()


def _chunks(pieces: Sequence[TokenPiece]) -> Iterator[TokenizedParagraphs]:
    """All paragraphs, in chunks of about `_CHUNK_TOKENS` that are mapped one by one: few pages stay in memory."""
    for piece in pieces:
        lengths, position = piece.paragraph_lengths(), 0
        for first in range(0, len(lengths), COPY_NUMBERS):
            some = lengths[first : first + COPY_NUMBERS]
            borders = np.flatnonzero(np.diff(np.cumsum(some, dtype=np.int64) // _CHUNK_TOKENS)) + 1
            for chunk in np.split(some, borders):
                count = int(chunk.sum(dtype=np.int64))
                yield piece.tokens(position, position + count), chunk
                position += count
