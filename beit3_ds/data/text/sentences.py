"""Finds sentences in paragraphs of token ids, and cuts paragraphs that are longer than a sequence.

A sentence ends with `.`, `!`, `?` or `…` before white space or an East Asian character. It also ends with `。` or a
full-width `!` or `?`. Closing quotes and brackets belong to the sentence. By this rule, "3.5" and "?q=" contain no
sentence end, but "Mr. Smith" contains one.

The rule is applied once to every entry of the tokenizer's vocabulary. Long paragraphs then need one table look-up per
token. Two kinds of sentence ends are not found: those inside a vocabulary entry, and those with a punctuation mark that
the vocabulary lacks.
"""

from bisect import bisect_right
from collections.abc import Iterator
from unicodedata import category, east_asian_width

import numpy as np
from numpy.typing import NDArray

from beit3_ds.tokenizers.text import TextTokenizer

_SPACE = "\u2581"  # SentencePiece's symbol for white space
_WIDE_MARKS = "。！？｡"  # noqa: RUF001, these characters are intended
_MARKS = f".!?…{_WIDE_MARKS}"
_ENDS, _ENDS_WIDE, _CLOSES, _OPENS, _OPENS_AFTER_WIDE = (1 << bit for bit in range(5))  # effects of pieces on sentences


class ParagraphCutter:
    """Cuts long paragraphs of token ids at sentence ends; takes a few bytes of memory per vocabulary entry."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        """Determines which entries of the vocabulary can begin, end or continue a sentence."""
        self._words, self._eos_id = tokenizer.word_borders(), tokenizer.eos_id
        pieces = (tokenizer.piece(id_) for id_ in range(tokenizer.vocab_size))
        kinds = (_kind(piece, *map(bool, borders)) for piece, *borders in zip(pieces, *self._words, strict=True))
        self._kinds = np.fromiter(kinds, dtype=np.uint8, count=tokenizer.vocab_size)

    def content_lengths(self, ids: NDArray[np.generic], lengths: NDArray[np.generic]) -> NDArray[np.int64]:
        """Counts the ids of each paragraph, without the separator (EOS) at its end.

        Args:
            ids: ids of all paragraphs, concatenated, (ids,).
            lengths: number of ids per paragraph, (paragraphs,).

        Returns:
            The counts, (paragraphs,) int64.
        """
        contents = lengths.astype(np.int64)
        (filled,) = np.nonzero(contents)
        contents[filled] -= ids[np.cumsum(contents)[filled] - 1] == self._eos_id
        return contents

    def sentence_starts(self, ids: NDArray[np.generic], lengths: NDArray[np.generic]) -> NDArray[np.int64]:
        """Finds the starts of all sentences except the first sentence of each paragraph.

        Args:
            ids: ids of all paragraphs, concatenated, (ids,).
            lengths: number of ids per paragraph, (paragraphs,).

        Returns:
            Index in `ids` of the first id of each found sentence, ascending, (sentences,) int64.
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
        """Cuts paragraphs longer than `limit` into sequences of at most `limit` ids, not counting separators.

        A sequence ends with the last sentence that fits. A sentence that is longer than a sequence is cut between two
        words. A word that is longer than a sequence is cut where the sequence is full.

        Args:
            ids: ids of all paragraphs, concatenated, (ids,).
            lengths: number of ids per paragraph, (paragraphs,).
            limit: maximum ids per sequence.

        Yields:
            Index in `ids` of the first id of each sequence, in ascending order, except for the first sequence of each
            paragraph.
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
                    words = np.flatnonzero(self._words.mark_word_starts(ids[start : start + limit + 1])[1:])
                    start += 1 + int(words[-1]) if len(words) else limit
                yield start


def _skip_runs(positions: NDArray[np.int64], skipped: NDArray[np.int64]) -> NDArray[np.int64]:
    """Moves each position that is in `skipped` to the next number not in `skipped`; both arrays are ascending."""
    if not len(skipped):
        return positions
    run_ends = skipped[np.append(np.flatnonzero(np.diff(skipped) > 1), len(skipped) - 1)] + 1
    found = skipped[np.minimum(np.searchsorted(skipped, positions), len(skipped) - 1)] == positions
    moved = positions.copy()
    moved[found] = run_ends[np.searchsorted(run_ends, positions[found], side="right")]
    return moved


def _kind(piece: str, starts_word: bool, ends_word: bool) -> int:
    """Returns the sum of three flags such as `_ENDS`. They tell whether a vocabulary entry can begin, end and continue
    a sentence.
    """
    if ends_word and piece.endswith(_SPACE):
        # White space follows, so any mark ends a sentence, whatever comes next.
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
    continues = piece[0] in _MARKS or _is_closer(piece[0])
    if not continues:
        kind |= _OPENS_AFTER_WIDE
    if starts_word or (east_asian_width(piece[0]) in ("W", "F") and not continues):
        kind |= _OPENS
    return kind


def _is_closer(character: str) -> bool:
    return character in "\"'" or category(character) in ("Pe", "Pf")  # closing brackets and quotes
