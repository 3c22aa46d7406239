"""Chooses which patches and tokens to mask and predict (masked data modeling, paper section 2.2)."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from beit3_ds.tokenizers.text import WordBorders

FIRST_PIECE_ID = 4
"""Smallest id of a SentencePiece piece; smaller ids are BOS, padding, EOS and unknown."""

_ATTEMPTS = 10
_MIN_ASPECT = 0.3


def block_mask(grid_size: int, num_masked: int, rng: np.random.Generator, min_block: int = 16) -> NDArray[np.bool_]:
    """Masks exactly `num_masked` patches of an image, in rectangular blocks.

    Follows BEiT (Bao et al., 2021, arXiv:2106.08254, algorithm 1). The area of a block is drawn between two bounds:
    `min_block` and the number of patches left to mask. Either bound may be the larger one. The aspect ratio is
    log-uniform in [0.3, 1/0.3]. A block is rejected if it is at least as high or as wide as the image, or masks no new
    patch or too many new patches. After ten rejected blocks in a row, single random patches complete the mask, as in
    BEiT v2.

    Args:
        grid_size: patches per side of the image.
        num_masked: patches to mask, from 0 to grid_size^2.
        rng: random generator.
        min_block: minimum area of a block in patches; the maximum area if fewer patches are left to mask. Values above
            `num_masked` count as `num_masked`.

    Returns:
        True for masked patches, (grid_size^2,) bool, in row-major order.
    """
    assert 0 <= num_masked <= grid_size**2, f"cannot mask {num_masked} of {grid_size**2} patches"
    mask = np.zeros((grid_size, grid_size), dtype=bool)
    remaining = num_masked
    while remaining and (block := _find_block(mask, remaining, min(min_block, num_masked), rng)):
        mask[block] = True
        remaining = num_masked - int(mask.sum())
    flat = mask.reshape(-1)
    flat[rng.choice(np.flatnonzero(~flat), remaining, replace=False)] = True
    return flat


def _find_block(
    mask: NDArray[np.bool_], remaining: int, min_block: int, rng: np.random.Generator
) -> tuple[slice, slice] | None:
    """Draws a block with 1 to `remaining` unmasked patches; returns None after ten failed attempts."""
    grid_size = len(mask)
    for _ in range(_ATTEMPTS):
        # If remaining < min_block, the area exceeds `remaining`, so only a block that overlaps masked patches fits.
        area = rng.uniform(*sorted((min_block, remaining)))
        aspect = math.exp(rng.uniform(math.log(_MIN_ASPECT), -math.log(_MIN_ASPECT)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (height < grid_size and width < grid_size):
            continue
        top, left = rng.integers(grid_size - height + 1), rng.integers(grid_size - width + 1)
        block = slice(top, top + height), slice(left, left + width)
        if 0 < np.count_nonzero(~mask[block]) <= remaining:
            return block
    return None


def mask_tokens(
    ids: NDArray[np.int64], ratio: float, mask_id: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Corrupts a text for masked language modeling, token by token.

    A text of n tokens, with BOS and EOS, has round(n * ratio) predicted tokens: at least 1, at most n - 1. BOS is never
    predicted. Any EOS may be predicted, including an EOS between documents. A predicted token becomes the mask token
    with probability 0.8 and a random piece with probability 0.1. With probability 0.1, the token stays unchanged
    (Devlin et al., 2018, arXiv:1810.04805, section 3.1).

    Args:
        ids: BOS, pieces and EOS, (n,) int64, with n at least 2.
        ratio: share of the tokens to predict.
        mask_id: id of the mask token; random pieces have ids in [4, mask_id).
        rng: random generator.

    Returns:
        The corrupted ids, (n,) int64, and the predicted positions, ascending, (predictions,) int64.
    """
    assert len(ids) >= 2, "a text has BOS and EOS"
    positions = np.sort(1 + rng.choice(len(ids) - 1, _num_masked_tokens(len(ids), ratio), replace=False))
    return _corrupt(ids, positions, mask_id, rng), positions


def mask_words(
    ids: NDArray[np.int64], ratio: float, mask_id: int, words: WordBorders, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Corrupts a text for masked language modeling, word by word.

    `words` tells which ids start a word. A word lasts until the next word starts. Every EOS is a word, including an EOS
    between documents. If a text begins within a word, the rest of this word counts as a word.

    Words are chosen at random. Their total number of tokens is as near as possible to the number of tokens that
    `mask_tokens` would choose; the smaller total wins a tie. At least one word is chosen. If there are several words,
    at least one is not chosen. Each token of a chosen word is replaced or kept as in `mask_tokens`.

    Args:
        ids: BOS, pieces and EOS, (n,) int64, with n at least 2.
        ratio: share of the tokens to predict.
        mask_id: id of the mask token; random pieces have ids in [4, mask_id).
        words: tells which token ids start a word.
        rng: random generator.

    Returns:
        The corrupted ids, (n,) int64, and the predicted positions, ascending, (predictions,) int64.
    """
    assert len(ids) >= 2, "a text has BOS and EOS"
    begins = words.mark_word_starts(ids)
    begins[1] = begins[-1] = True
    starts = 1 + np.flatnonzero(begins[1:])
    stops = np.append(starts[1:], len(ids))
    order = rng.permutation(len(starts))
    chosen = order[_choose_sizes((stops - starts)[order].tolist(), _num_masked_tokens(len(ids), ratio))]
    positions = np.concatenate([np.arange(starts[word], stops[word]) for word in np.sort(chosen)])
    return _corrupt(ids, positions, mask_id, rng), positions


def _num_masked_tokens(length: int, ratio: float) -> int:
    return max(1, min(round(length * ratio), length - 1))


def _choose_sizes(sizes: list[int], target: int) -> list[int]:
    """Chooses sizes with a sum as near to `target` as possible, and returns their indices. Prefers earlier sizes.

    At least one size is chosen. If `sizes` has several elements, at least one is not chosen. The sums are found by
    dynamic programming: bit s of a Python integer is set if some sizes add up to s.
    """
    reachable = [1]  # sums reachable with the last 0, 1, 2, ... sizes
    for size in reversed(sizes):
        reachable.append(reachable[-1] | reachable[-1] << size)
    total = sum(sizes)
    sums = [s for s in range(1, total + 1) if reachable[-1] >> s & 1 and (s < total or len(sizes) == 1)]
    left = min(sums, key=lambda s: (abs(s - target), s))
    chosen = []
    for number, size in enumerate(sizes):
        if size <= left and reachable[len(sizes) - 1 - number] >> (left - size) & 1:
            chosen.append(number)
            left -= size
    return chosen


def _corrupt(
    ids: NDArray[np.int64], positions: NDArray[np.int64], mask_id: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Returns the ids after corruption. On average, 80% of those at `positions` are masked, and 10% become random."""
    fate = rng.random(len(positions))
    pieces = rng.integers(FIRST_PIECE_ID, mask_id, len(positions))
    corrupted = ids.copy()
    corrupted[positions] = np.where(fate < 0.8, mask_id, np.where(fate < 0.9, pieces, ids[positions]))
    return corrupted


@dataclass(frozen=True, kw_only=True, eq=False)
class TextMasking:
    """Masks the tokens of texts, as single tokens or as whole words."""

    ratio: float
    """Share of a text's tokens to predict."""
    mask_id: int
    """Id of the mask token."""
    words: WordBorders | None
    """Tells which token ids start a word, for masking whole words; None masks single tokens."""

    def __call__(self, ids: NDArray[np.int64], rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns the corrupted ids, (n,) int64, and the predicted positions, ascending, (predictions,) int64.

        Args:
            ids: BOS, pieces and EOS, (n,) int64, with n at least 2.
            rng: random generator.
        """
        if self.words is None:
            return mask_tokens(ids, self.ratio, self.mask_id, rng)
        return mask_words(ids, self.ratio, self.mask_id, self.words, rng)
