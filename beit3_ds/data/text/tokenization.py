"""Encodes paragraphs to token ids, and packs paragraphs into sequences.

EOS separates documents, and a sequence may cross documents, as in RoBERTa (Liu et al., 2019, arXiv:1907.11692, section
4.2, FULL-SENTENCES). The separator is the last id of a document's last paragraph. If a document and a sequence end at
the same token, the separator is also the sequence's EOS.
"""

from collections.abc import Iterable, Iterator
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from beit3_ds.data.text.paragraphs import Paragraph
from beit3_ds.data.text.sentences import ParagraphCutter
from beit3_ds.tokenizers.text import TextTokenizer

TokenizedParagraphs: TypeAlias = tuple[NDArray[np.generic], NDArray[np.generic]]
"""Token ids of consecutive paragraphs, (ids,) in `token_dtype`, and number of ids per paragraph, (paragraphs,)."""

_CHUNK_PARAGRAPHS = 4096
_CHUNK_CHARACTERS = 1 << 20


def token_dtype(vocab_size: int) -> np.dtype[np.generic]:
    """Returns the dtype for storing token ids: uint16 for at most 65536 vocabulary entries, otherwise uint32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def encode_paragraphs(
    paragraphs: Iterable[Paragraph], tokenizer: TextTokenizer, document_separator: bool
) -> Iterator[TokenizedParagraphs]:
    """Encodes consecutive paragraphs to token ids; yields chunks of at most 4096 paragraphs and about a million
    characters.

    Args:
        paragraphs: paragraphs of one file or piece, in order.
        tokenizer: tokenizer that encodes the paragraphs.
        document_separator: whether to append EOS to every document that is not empty.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    is_open = False  # whether there are ids since the last separator
    for chunk in _chunks(paragraphs):
        ids, lengths = tokenizer.encode_batch([paragraph.text for paragraph in chunk])
        if document_separator:
            ends = np.flatnonzero([paragraph.ends_document for paragraph in chunk])
            totals = np.concatenate([[0 if not is_open else -1], np.cumsum(lengths)[ends]])
            ends = ends[np.diff(totals) > 0]
            is_open = int(lengths.sum()) > totals[-1]
            ids = np.insert(ids, np.cumsum(lengths)[ends], tokenizer.eos_id)
            lengths[ends] += 1
        yield ids.astype(dtype), lengths


def sequence_starts(chunks: Iterable[TokenizedParagraphs], limit: int, cutter: ParagraphCutter) -> Iterator[int]:
    """Packs consecutive paragraphs into sequences of at most `limit` tokens.

    A paragraph that fits into a sequence stays whole. A longer paragraph starts a new sequence, and `cutter` cuts it,
    between sentences if possible. The last part of a cut paragraph and the next paragraph are in one sequence if both
    fit.

    Args:
        chunks: paragraphs from `encode_paragraphs`; empty paragraphs have no effect.
        limit: maximum tokens per sequence, not counting a separator at the end.
        cutter: cuts long paragraphs.

    Yields:
        The start of each sequence, as the number of tokens before it.
    """
    assert limit >= 1, f"a sequence of {limit} tokens has no room for text"
    start = end = 0  # start and end of the sequence that is being filled
    for ids, lengths in chunks:
        chunk_start = end
        contents = cutter.content_lengths(ids, lengths)
        cuts = cutter.cuts(ids, lengths, limit)
        for length, content in zip(lengths.tolist(), contents.tolist(), strict=True):
            if end + content - start > limit and end > start:
                yield start
                start = end
            while end + content - start > limit:
                yield start
                start = chunk_start + next(cuts)
            end += length
    if end > start:
        yield start


def _chunks(paragraphs: Iterable[Paragraph]) -> Iterator[list[Paragraph]]:
    chunk: list[Paragraph] = []
    num_characters = 0
    for paragraph in paragraphs:
        chunk.append(paragraph)
        num_characters += len(paragraph.text)
        if len(chunk) == _CHUNK_PARAGRAPHS or num_characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, num_characters = [], 0
    if chunk:
        yield chunk
