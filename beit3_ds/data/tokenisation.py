"""From paragraphs to ids, and from ids to the borders of sequences; all streamed."""

from collections.abc import Iterable, Iterator
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from beit3_ds.data.sentences import ParagraphCutter
from beit3_ds.tokenizers.text import TextTokenizer

TokenBlock: TypeAlias = tuple[NDArray[np.generic], NDArray[np.generic]]
"""All ids of consecutive paragraphs, (n,) in `token_dtype`, and how many each of them has, (paragraphs,)."""

_BLOCK_PARAGRAPHS = 4096
_BLOCK_CHARACTERS = 1 << 20


def token_dtype(vocab_size: int) -> np.dtype[np.generic]:
    """The smallest type that ids are stored in: two bytes up to 65536 ids, else four."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def encode_paragraphs(paragraphs: Iterable[str], tokenizer: TextTokenizer) -> Iterator[TokenBlock]:
    """Yields the ids of consecutive paragraphs, a block of about a million characters at a time."""
    dtype = token_dtype(tokenizer.vocab_size)
    for block in _blocks(paragraphs):
        ids, lengths = tokenizer.encode_batch(block)
        yield ids.astype(dtype), lengths


def sequence_starts(blocks: Iterable[TokenBlock], limit: int, cutter: ParagraphCutter) -> Iterator[int]:
    """Packs consecutive paragraphs into sequences of at most `limit` tokens.

    A paragraph that fits into a sequence stays whole. A longer one starts a sequence and is cut at sentences; its rest
    goes on with the next paragraph.

    Args:
        blocks: the paragraphs, as `encode_paragraphs` gives them; empty ones change nothing, and ids are read only of
            blocks that hold a long one.
        limit: tokens of a sequence at most.
        cutter: cuts long paragraphs.

    Yields:
        Where each sequence starts, counted in tokens from the first paragraph.
    """
    assert limit >= 1, f"a sequence of {limit} tokens holds no text"
    start = end = 0  # the open sequence
    for ids, lengths in blocks:
        block_start = end
        cuts = cutter.cuts(ids, lengths, limit)
        for length in lengths.tolist():
            if end + length - start > limit and end > start:
                yield start
                start = end
            end += length
            while end - start > limit:
                yield start
                start = block_start + next(cuts)
    if end > start:
        yield start


def _blocks(paragraphs: Iterable[str]) -> Iterator[list[str]]:
    block: list[str] = []
    num_characters = 0
    for paragraph in paragraphs:
        block.append(paragraph)
        num_characters += len(paragraph)
        if len(block) == _BLOCK_PARAGRAPHS or num_characters >= _BLOCK_CHARACTERS:
            yield block
            block, num_characters = [], 0
    if block:
        yield block
