"""Plain text files as token sequences of bounded length."""

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from beit3_ds.config import ConfigError
from beit3_ds.data.files import expand_patterns
from beit3_ds.tokenizers.text import TextTokenizer

_PARAGRAPHS_AT_A_TIME = 4096


class TextSequences:
    """The texts of UTF-8 files, one paragraph a line, cut into sequences of at most `length` tokens.

    Consecutive paragraphs of a file share a sequence as long as the next one fits whole; only a paragraph longer than
    a sequence is cut, and its rest goes on with the next paragraph. Blank lines carry no meaning.

    All is tokenised at the start and kept in memory, two bytes a token with a vocabulary below 65536, in each process:
    fit for some gigabytes of text. A larger corpus needs its tokens stored on disk first.
    """

    def __init__(self, patterns: Iterable[str], tokenizer: TextTokenizer, length: int) -> None:
        """Reads and tokenises the files.

        Args:
            patterns: files or glob patterns.
            tokenizer: turns paragraphs into ids.
            length: tokens of a sequence at most, BOS and EOS included; at least 3.

        Raises:
            ConfigError: for a pattern without a match, or a file that is unreadable, not UTF-8 or without text.
        """
        self.paths = expand_patterns(patterns)
        self._bos_id, self._eos_id = tokenizer.bos_id, tokenizer.eos_id
        dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32)
        files = [_tokenise(path, tokenizer, length - 2, dtype) for path in self.paths]
        sizes = [len(ids) for ids, _ in files]
        file_starts = np.cumsum([0, *sizes[:-1]])
        self._ids = np.concatenate([ids for ids, _ in files])
        starts = [start + borders for start, (_, borders) in zip(file_starts, files, strict=True)]
        self._borders = np.concatenate([*starts, [len(self._ids)]])
        self._first_of_file = np.cumsum([0, *(len(borders) for _, borders in files[:-1])])

    def __len__(self) -> int:
        """Sequences in all files."""
        return len(self._borders) - 1

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Returns the ids of a sequence, BOS and EOS included, (n,) int64."""
        ids = self._ids[self._borders[index] : self._borders[index + 1]]
        return np.concatenate([[self._bos_id], ids, [self._eos_id]]).astype(np.int64)

    def name(self, index: int) -> str:
        """File of a sequence and its number there, for messages."""
        file = int(np.searchsorted(self._first_of_file, index, side="right")) - 1
        return f"{self.paths[file]}:{index - self._first_of_file[file]}"


def read_paragraphs(path: str) -> Iterator[str]:
    """Yields the paragraphs of a text file: its lines, without those that are blank.

    Raises:
        ConfigError: if the file is unreadable or not UTF-8.
    """
    try:
        with open(path, encoding="utf-8") as file:
            yield from (line.strip() for line in file if not line.isspace())
    except UnicodeDecodeError as error:
        raise ConfigError(f"data: {path} is not UTF-8: {error}. Convert it, for example with iconv.") from error
    except OSError as error:
        raise ConfigError(f"data: {path} cannot be read: {error}.") from error


def _tokenise(
    path: str, tokenizer: TextTokenizer, limit: int, dtype: np.dtype[np.generic]
) -> tuple[NDArray[np.generic], NDArray[np.int64]]:
    """Returns all ids of a file, (n,) `dtype`, and where in them each sequence starts, (sequences,) int64."""
    ids: list[NDArray[np.generic]] = []
    lengths: list[int] = []
    paragraphs = read_paragraphs(path)
    while batch := list(islice(paragraphs, _PARAGRAPHS_AT_A_TIME)):
        encoded = tokenizer.encode_batch(batch)
        lengths.extend(map(len, encoded))
        ids.append(np.array([token for paragraph in encoded for token in paragraph], dtype=dtype))
    if sum(lengths) == 0:
        raise ConfigError(f"data: {path} holds no text. Leave it out of the config.")
    return np.concatenate(ids), np.array(sequence_starts(lengths, limit), dtype=np.int64)


def sequence_starts(lengths: Iterable[int], limit: int) -> list[int]:
    """Cuts consecutive paragraphs into sequences of at most `limit` tokens.

    Args:
        lengths: tokens of each paragraph; empty ones change nothing.
        limit: tokens of a sequence at most.

    Returns:
        Where each sequence starts, counted in tokens from the first paragraph.
    """
    assert limit >= 1, f"a sequence of {limit} tokens holds no text"
    starts: list[int] = []
    start = end = 0  # the open sequence
    for length in lengths:
        if end + length - start > limit and end > start:
            starts.append(start)
            start = end
        end += length
        while end - start > limit:
            starts.append(start)
            start += limit
    if end > start:
        starts.append(start)
    return starts
