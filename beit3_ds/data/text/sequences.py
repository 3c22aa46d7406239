"""Cuts text files into token sequences of bounded length."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from beit3_ds.config import ConfigError
from beit3_ds.data.files.fingerprint import SourceFile
from beit3_ds.data.files.patterns import expand_patterns
from beit3_ds.data.text.paragraphs import BrokenLines, read_paragraphs, whole_file
from beit3_ds.data.text.sentences import ParagraphCutter
from beit3_ds.data.text.sequence_borders import PreparedText
from beit3_ds.data.text.tokenization import encode_paragraphs, sequence_starts
from beit3_ds.printing import printable
from beit3_ds.tokenizers.text import TextTokenizer


class TextSequences:
    """Cuts texts into sequences of at most `length` tokens.

    Each sequence is filled with consecutive whole paragraphs of one file, as many as fit. EOS separates documents,
    unless `document_separator` is false. A paragraph longer than a sequence is cut between sentences; its last part
    shares a sequence with the next paragraph. A sentence longer than a sequence is cut between words if possible.

    Without `cache_dir`, the constructor tokenizes all text and keeps it in memory. This takes two bytes per token if
    the vocabulary has at most 65536 ids. With `cache_dir`, the token files from `beit3 prepare texts` are
    memory-mapped. The sequences are equal in both cases.

    Attributes:
        paths: paths of the text files.
        broken: skipped lines, each with file, line number and reason.
        empty: paths of the files without text.
    """

    def __init__(
        self,
        patterns: Iterable[str],
        tokenizer: TextTokenizer,
        length: int,
        cache_dir: str | None = None,
        max_broken_lines: int = 0,
        document_separator: bool = True,
    ) -> None:
        """Opens the text files, or their token files.

        Args:
            patterns: paths of text files or glob patterns.
            tokenizer: tokenizer that encodes the paragraphs.
            length: maximum tokens per sequence, including BOS and EOS; at least 3.
            cache_dir: folder of prepared token files (`data.cache_dir`); None tokenizes the text in memory.
            max_broken_lines: maximum number of broken lines in all files together.
            document_separator: whether every document ends with EOS (`data.document_separator`).

        Raises:
            ConfigError: if a pattern has no match, a file is unreadable, no file has text, too many lines are broken,
                or a token file is missing, damaged or out of date.
            StorageError: if the file system fails.
        """
        self.paths = expand_patterns(patterns)
        self._bos_id, self._eos_id = tokenizer.bos_id, tokenizer.eos_id
        broken = BrokenLines(max_broken_lines)
        self._files: Sequence[_TextInMemory | PreparedText]
        if cache_dir is None:
            cutter = ParagraphCutter(tokenizer)
            self._files = [
                _TextInMemory(path, tokenizer, length, cutter, broken, document_separator) for path in self.paths
            ]
        else:
            folder = texts_folder(cache_dir)
            prepared = [PreparedText(folder, path, tokenizer, length, document_separator) for path in self.paths]
            for file in prepared:
                broken.extend(list(file.broken))
            self._files = prepared
        self.broken = tuple(broken.lines)
        self.empty = tuple(path for path, text in zip(self.paths, self._files, strict=True) if not len(text))
        if len(self.empty) == len(self.paths):
            more = f" and {len(self.paths) - 1} more" if len(self.paths) > 1 else ""
            raise ConfigError(f"data: no text in {printable(self.paths[0])}{more}. Leave it out of the config.")
        self._first_of_file = np.cumsum([0, *(len(file) for file in self._files)])

    def __len__(self) -> int:
        """Returns the number of sequences in all files."""
        return int(self._first_of_file[-1])

    def files(self) -> Iterator[SourceFile]:
        """Yields the name, size in bytes and number of sequences of each text file.

        Raises:
            ConfigError: if a file no longer exists.
        """
        for path, sequences in zip(self.paths, self._files, strict=True):
            try:
                num_bytes = os.stat(path).st_size
            except OSError as error:
                raise ConfigError(f"data: {path} cannot be read: {error}. Fetch it again.") from error
            yield SourceFile(os.path.basename(path), num_bytes, len(sequences))

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Returns the ids of a sequence, including BOS and EOS, (ids,) int64."""
        file = self._file_of(index)
        ids = self._files[file].ids(index - int(self._first_of_file[file]))
        if ids[-1] == self._eos_id:  # the sequence ends with a document
            ids = ids[:-1]
        return np.concatenate([[self._bos_id], ids, [self._eos_id]]).astype(np.int64)

    def name(self, index: int) -> str:
        """Returns a sequence's name for messages: path of the text file, and index of the sequence in that file."""
        file = self._file_of(index)
        return f"{self.paths[file]}:{index - self._first_of_file[file]}"

    def _file_of(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        return int(np.searchsorted(self._first_of_file, index, side="right")) - 1


def texts_folder(cache_dir: str) -> Path:
    """Returns the folder inside `cache_dir` that contains the token files of texts."""
    return Path(cache_dir) / "texts"


class _TextInMemory:
    """Tokenizes one whole text file and keeps the sequences in memory."""

    def __init__(
        self,
        path: str,
        tokenizer: TextTokenizer,
        length: int,
        cutter: ParagraphCutter,
        broken: BrokenLines,
        document_separator: bool,
    ) -> None:
        paragraphs = read_paragraphs(whole_file(path), broken)
        chunks = list(encode_paragraphs(paragraphs, tokenizer, document_separator))
        self._ids = np.concatenate([np.empty(0, dtype=np.uint16), *(ids for ids, _ in chunks)])
        self._borders = np.array([*sequence_starts(chunks, length - 2, cutter), len(self._ids)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._borders) - 1

    def ids(self, index: int) -> NDArray[np.generic]:
        return self._ids[self._borders[index] : self._borders[index + 1]]
