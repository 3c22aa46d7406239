"""Which patches and tokens are hidden and must be predicted (masked data modeling, paper section 2.2)."""

import math

import numpy as np
from numpy.typing import NDArray

FIRST_PIECE_ID = 4
"""The smallest id that is a piece of text; BOS, padding, EOS and unknown lie below."""

_ATTEMPTS = 10
_MIN_ASPECT = 0.3


def block_mask(grid_size: int, num_masked: int, rng: np.random.Generator, min_block: int = 16) -> NDArray[np.bool_]:
    """Hides exactly `num_masked` patches of an image, in blocks.

    The rule of BEiT (Bao et al., 2021, arXiv:2106.08254, algorithm 1): blocks of at least `min_block` patches and at
    most what remains, aspect log-uniform in [0.3, 1/0.3], are added while ten attempts find one that hides between
    one new patch and what remains; single patches at random complete the number, as in BEiT v2.

    Args:
        grid_size: patches on a side.
        num_masked: patches to hide, from 0 to grid_size^2.
        rng: where all draws come from.
        min_block: patches of a block at least, clipped to `num_masked` so that small grids have blocks too.

    Returns:
        True where a patch is hidden, (grid_size^2,) bool, row by row.
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
    """Draws a block that hides between 1 and `remaining` new patches; None after ten attempts without one."""
    grid_size = len(mask)
    for _ in range(_ATTEMPTS):
        # With less than min_block remaining, the draw lies between the two: the block must overlap hidden patches.
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

    Of n tokens, BOS and EOS included, min(round(n * ratio), n - 1) but at least 1 are to be predicted; BOS, the
    text's summary, never is. Of these each becomes the mask token with probability 0.8, a random piece with 0.1, and
    stays as it is with 0.1 (Devlin et al., 2018, arXiv:1810.04805, section 3.1).

    Args:
        ids: BOS, pieces, EOS, (n,) int64, n at least 2.
        ratio: share of the tokens to be predicted.
        mask_id: id of the mask token; the random pieces lie in [4, mask_id).
        rng: where all draws come from.

    Returns:
        The corrupted ids, (n,) int64, and the positions to be predicted, ascending, (k,) int64.
    """
    assert len(ids) >= 2, "a text has BOS and EOS"
    num_masked = max(1, min(round(len(ids) * ratio), len(ids) - 1))
    positions = np.sort(1 + rng.choice(len(ids) - 1, num_masked, replace=False))
    fate = rng.random(num_masked)
    pieces = rng.integers(FIRST_PIECE_ID, mask_id, num_masked)
    corrupted = ids.copy()
    corrupted[positions] = np.where(fate < 0.8, mask_id, np.where(fate < 0.9, pieces, ids[positions]))
    return corrupted, positions
