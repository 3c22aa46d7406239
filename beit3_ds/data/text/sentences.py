"""Where sentences start in a paragraph of ids, and where one longer than a sequence is cut.

A sentence ends with `.`, `!`, `?` or `…` before white space or an East Asian character, or with `。` or a full-width
`!` or `?` before anything; closing quotes and brackets that follow at once belong to it. So "3.5" and "?q=" hold no
end, and "Mr. Smith" holds one: the rule knows no abbreviations.

It reads the pieces that ids stand for, not the text: one look-up a token where paragraphs are long. Ids stay those of
the whole paragraph, and token files need no marks. An end that no border of pieces shows, because the vocabulary lacks
its character or a piece goes on behind it, is not seen.
"""

from bisect import bisect_right
from collections.abc import Iterator
from unicodedata import category, east_asian_width

import numpy as np
from numpy.typing import NDArray

from beit3_ds.tokenizers.text import TextTokenizer

_SPACE = "\u2581"  # as SentencePiece writes it
_WIDE_MARKS = "。！？｡"  # noqa: RUF001, they are meant
_MARKS = f".!?…{_WIDE_MARKS}"
_ENDS, _ENDS_WIDE, _CLOSES, _OPENS, _OPENS_AFTER_WIDE = (1 << bit for bit in range(5))  # what pieces do to sentences


class ParagraphCutter:
    """Cuts paragraphs of one tokenizer's ids at sentences. Holds two bytes an id of the vocabulary."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        """Reads what the pieces of the tokenizer say about sentences."""
        self._words, self._eos_id = tokenizer.word_borders(), tokenizer.eos_id
        pieces = (tokenizer.piece(id_) for id_ in range(tokenizer.vocab_size))
        kinds = (_kind(piece, *map(bool, borders)) for piece, *borders in zip(pieces, *self._words, strict=True))
        self._kinds = np.fromiter(kinds, dtype=np.uint8, count=tokenizer.vocab_size)

    def content_lengths(self, ids: NDArray[np.generic], lengths: NDArray[np.generic]) -> NDArray[np.int64]:
        """Counts the ids of each paragraph, without a separator (EOS) at its end.

        Args:
            ids: all ids of the paragraphs, (n,).
            lengths: number of ids of each paragraph, (paragraphs,).

        Returns:
            The counts, (paragraphs,).
        """
        contents = lengths.astype(np.int64)
        (filled,) = np.nonzero(contents)
        contents[filled] -= ids[np.cumsum(contents)[filled] - 1] == self._eos_id
        return contents

    def sentence_starts(self, ids: NDArray[np.generic], lengths: NDArray[np.generic]) -> NDArray[np.int64]:
        """Finds the sentences of paragraphs behind their first ones.

        Args:
            ids: all ids of the paragraphs, (n,).
            lengths: ids of each paragraph, (paragraphs,).

        Returns:
            Number of the first id of each, rising.
        """
        kinds = self._kinds[ids]
        ends = np.flatnonzero(kinds & (_ENDS | _ENDS_WIDE))
        starts = _skip_runs(ends + 1, np.flatnonzero(kinds & _CLOSES))
        borders = np.cumsum(lengths, dtype=np.int64)
        inside = np.searchsorted(borders, ends, side="right") == np.searchsorted(borders, starts, side="right")
        ends, starts = ends[inside], starts[inside]
        opens = np.where(kinds[ends] & _ENDS_WIDE, _OPENS_AFTER_WIDE, _OPENS)
        return starts[(kinds[starts] & opens) > 0]

    def cuts(self, ids: NDArray[np.generic], lengths: NDArray[np.generic], limit: int) -> Iterator[int]:
        """Cuts paragraphs longer than `limit` into sequences of at most `limit` ids, separators not counted.

        A sequence ends at the last end of a sentence that fits. Within a sentence longer than a sequence it ends before
        the last start of a word that fits, and within a word longer than a sequence where it is full.

        Args:
            ids: all ids of the paragraphs, (n,).
            lengths: number of ids of each paragraph, (paragraphs,).
            limit: most ids of a sequence.

        Yields:
            Number of the first id of each sequence except the first one of a paragraph, ascending.
        """
        starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)[:-1]])
        stops = starts + self.content_lengths(ids, lengths)
        long = np.flatnonzero(stops - starts > limit)
        sentences = self.sentence_starts(ids, lengths).tolist() if len(long) else []
        for start, end in zip(starts[long].tolist(), stops[long].tolist(), strict=True):
            while end - start > limit:
                last = bisect_right(sentences, start + limit) - 1
                if last >= 0 and sentences[last] > start:
                    start = sentences[last]
                else:
                    words = np.flatnonzero(self._words.begins(ids[start : start + limit + 1])[1:])
                    start += 1 + int(words[-1]) if len(words) else limit
                yield start


def _skip_runs(positions: NDArray[np.int64], skipped: NDArray[np.int64]) -> NDArray[np.int64]:
    """Moves each position that is in `skipped`, rising, behind the run of numbers there that it is in."""
    if not len(skipped):
        return positions
    run_ends = skipped[np.append(np.flatnonzero(np.diff(skipped) > 1), len(skipped) - 1)] + 1
    found = skipped[np.minimum(np.searchsorted(skipped, positions), len(skipped) - 1)] == positions
    moved = positions.copy()
    moved[found] = run_ends[np.searchsorted(run_ends, positions[found], side="right")]
    return moved


def _kind(piece: str, starts_word: bool, ends_word: bool) -> int:
    """What a piece does to sentences: a sum of `_ENDS` and the others."""
    if ends_word and piece.endswith(_SPACE):
        # White space follows at once: any mark ends a sentence, whatever comes next.
        kind = _kind(piece[:-1], starts_word, ends_word=False) if piece != _SPACE else 0
        return kind & ~_ENDS | _ENDS_WIDE if kind & _ENDS else kind
    rest = piece
    while rest and _is_closer(rest[-1]):
        rest = rest[:-1]
    if not rest:
        return _CLOSES
    kind = 0
    if rest[-1] in _MARKS:
        kind = _ENDS_WIDE if rest[-1] in _WIDE_MARKS else _ENDS
    goes_on = piece[0] in _MARKS or _is_closer(piece[0])
    if not goes_on:
        kind |= _OPENS_AFTER_WIDE
    if starts_word or (east_asian_width(piece[0]) in ("W", "F") and not goes_on):
        kind |= _OPENS
    return kind


def _is_closer(character: str) -> bool:
    return character in "\"'" or category(character) in ("Pe", "Pf")  # closing brackets and quotes
