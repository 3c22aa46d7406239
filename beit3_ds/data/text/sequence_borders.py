"""Writes the borders between the sequences of a tokenized text file, and reads sequences from token files."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beit3_ds.atomic_file import atomic_write
from beit3_ds.config import ConfigError
from beit3_ds.data.files.reading import read_with_retries, storage_error
from beit3_ds.data.files.records import BrokenRecordError
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
from beit3_ds.printing import printable
from beit3_ds.tokenizers.text import TextTokenizer

_BORDERS = -1  # key of the memory-mapped borders in `PreparedText._maps`; the other keys are numbers of token files
_CHUNK_TOKENS = 1 << 20


def write_borders(folder: Path, text: str, pieces: Sequence[TokenPiece], length: int, cutter: ParagraphCutter) -> None:
    """Writes the `.borders` file of a text file, with the start of each sequence. Does nothing if the file is up to
    date.

    Args:
        folder: folder of the token files.
        text: path of the text file as in the config.
        pieces: all token files of the text file, in order.
        length: maximum tokens per sequence, including BOS and EOS.
        cutter: cuts long paragraphs.
    """
    path = _borders_path(folder, text, length)
    fingerprint = _fingerprint(pieces)
    with suppress(ConfigError):  # missing or damaged
        if read_footer(path)["pieces"] == fingerprint:
            return
    total = sum(piece.num_tokens for piece in pieces)
    starts = chain(sequence_starts(_chunks(pieces), length - 2, cutter), [total])
    count = 0
    with atomic_write(path) as file:
        while len(chunk := np.fromiter(islice(starts, COPY_NUMBERS), dtype="<i8")):
            file.write(chunk.tobytes())
            count += len(chunk)
        write_footer(file, {"count": count, "pieces": fingerprint})


class PreparedText:
    """Reads the token sequences of one text file from its token files.

    Ids and borders are memory-mapped when they are first needed; all processes of a machine share the mapped pages. A
    pickled copy opens its own memory maps.
    """

    def __init__(
        self, folder: Path, text: str, tokenizer: TextTokenizer, length: int, document_separator: bool = True
    ) -> None:
        """Opens the token files and the `.borders` file, and reads their footers.

        Args:
            folder: folder of the token files.
            text: path of the text file as in the config.
            tokenizer: tokenizer of the run. The token files must be from this tokenizer.
            length: maximum tokens per sequence, including BOS and EOS.
            document_separator: whether every document in the token files must end with EOS.

        Raises:
            ConfigError: if a file is missing, damaged or out of date; the message names the file.
        """
        self._pieces = find_token_pieces(folder, text, tokenizer, document_separator)
        self.broken = tuple(line for piece in self._pieces for line in piece.broken)
        self._borders_path = _borders_path(folder, text, length)
        if not self._borders_path.exists():
            raise ConfigError(
                f"data: {self._borders_path} is missing: {text} is tokenized, but not cut into sequences of "
                f"data.text_length={length} tokens. {REDO}"
            )
        footer = read_footer(self._borders_path)
        if footer.get("pieces") != _fingerprint(self._pieces):
            raise ConfigError(f"data: {self._borders_path} does not fit the token files beside it. {REDO}")
        self._num_borders, left = divmod(footer["offset"], 8)
        if not self._num_borders or left or footer.get("count") != self._num_borders:
            raise ConfigError(f"data: {self._borders_path} is damaged: its size is wrong. {REDO}")
        self._vocab_size, self._length = tokenizer.vocab_size, length
        self._piece_starts = np.cumsum([0, *(piece.num_tokens for piece in self._pieces)])
        self._maps: dict[int, NDArray[np.generic]] = {}

    def __len__(self) -> int:
        """Returns the number of sequences."""
        return self._num_borders - 1

    def ids(self, index: int) -> NDArray[np.generic]:
        """Reads the ids of a sequence, without BOS; the last id is EOS only if a document ends there.

        Raises:
            BrokenRecordError: if the `.borders` file or the ids in the token files are damaged.
            StorageError: if a file cannot be memory-mapped. A read error in a mapped file kills the process.
        """
        start, stop = (int(border) for border in self._borders()[index : index + 2])
        if not 0 <= start < stop <= min(start + self._length - 1, int(self._piece_starts[-1])):
            raise BrokenRecordError(
                f"{printable(str(self._borders_path))}: sequence {index} has damaged borders. {REDO}"
            )
        parts = []
        piece_index = int(np.searchsorted(self._piece_starts, start, side="right")) - 1
        while start < stop:
            first = int(self._piece_starts[piece_index])
            part = self._tokens(piece_index)[start - first : stop - first]
            parts.append(part)
            start += len(part)
            piece_index += 1
        ids = np.concatenate(parts)
        if ids.max() >= self._vocab_size:
            raise BrokenRecordError(f"{printable(str(self._borders_path))}: sequence {index} has damaged ids. {REDO}")
        return ids

    def _borders(self) -> NDArray[np.generic]:
        if _BORDERS not in self._maps:
            path, count = self._borders_path, self._num_borders
            self._maps[_BORDERS] = _map_with_retries(path, lambda: map_array(path, "<i8", 0, count))
        return self._maps[_BORDERS]

    def _tokens(self, piece_index: int) -> NDArray[np.generic]:
        if piece_index not in self._maps:
            piece = self._pieces[piece_index]
            self._maps[piece_index] = _map_with_retries(piece.path, piece.tokens)
        return self._maps[piece_index]

    def __getstate__(self) -> dict[str, Any]:
        # NumPy would pickle a map as a copy of its contents.
        return vars(self) | {"_maps": {}}


def _map_with_retries(path: Path, open_map: Callable[[], NDArray[np.generic]]) -> NDArray[np.generic]:
    """Memory-maps a file, with retries.

    Every failure is a storage error, because the file existed at the start of the run.
    """
    try:
        return read_with_retries(open_map, str(path), file_errors=frozenset())
    except OSError as error:  # an error without a number: the file was truncated
        raise storage_error(str(path), error, attempts=1) from error


def _borders_path(folder: Path, text: str, length: int) -> Path:
    return folder / f"{file_stem(text)}.length-{length}.borders"


def _fingerprint(pieces: Sequence[TokenPiece]) -> str:
    """Returns a digest of everything that determines the sequence borders, except the sequence length."""
    facts = [
        (piece.tokenizer, piece.document_separator, piece.piece.start, piece.text_size, piece.text_mtime_ns)
        for piece in pieces
    ]
    return hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()


def _chunks(pieces: Sequence[TokenPiece]) -> Iterator[TokenizedParagraphs]:
    """Yields all paragraphs in chunks of about a million tokens. Memory-maps one chunk at a time to save memory."""
    for piece in pieces:
        lengths, position = piece.paragraph_lengths(), 0
        for first in range(0, len(lengths), COPY_NUMBERS):
            some = lengths[first : first + COPY_NUMBERS]
            borders = np.flatnonzero(np.diff(np.cumsum(some, dtype=np.int64) // _CHUNK_TOKENS)) + 1
            for chunk in np.split(some, borders):
                count = int(chunk.sum(dtype=np.int64))
                yield piece.tokens(position, position + count), chunk
                position += count
