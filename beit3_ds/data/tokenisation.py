"""From paragraphs to ids, and from ids to the borders of sequences; all streamed."""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from beit3_ds.tokenizers.text import TextTokenizer

_BLOCK_PARAGRAPHS = 4096
_BLOCK_CHARACTERS = 1 << 20


def token_dtype(vocab_size: int) -> np.dtype[np.generic]:
    """The smallest type that ids are stored in: two bytes up to 65536 ids, else four."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def encode_paragraphs(
    paragraphs: Iterable[str], tokenizer: TextTokenizer
) -> Iterator[tuple[NDArray[np.generic], NDArray[np.int64]]]:
    """Yields the ids of consecutive paragraphs, a block of about a million characters at a time.

    Yields:
        All ids of a block, (n,) in `token_dtype`, and the ids of each of its paragraphs, (paragraphs,) int64.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    for block in _blocks(paragraphs):
        ids, lengths = tokenizer.encode_batch(block)
        yield ids.astype(dtype), lengths


def sequence_starts(lengths: Iterable[int], limit: int) -> Iterator[int]:
    """Cuts consecutive paragraphs into sequences of at most `limit` tokens.

    Args:
        lengths: tokens of each paragraph; empty ones change nothing.
        limit: tokens of a sequence at most.

    Yields:
        Where each sequence starts, counted in tokens from the first paragraph.
    """
    assert limit >= 1, f"a sequence of {limit} tokens holds no text"
    start = end = 0  # the open sequence
    for length in lengths:
        if end + length - start > limit and end > start:
            yield start
            start = end
        end += length
        while end - start > limit:
            yield start
            start += limit
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
