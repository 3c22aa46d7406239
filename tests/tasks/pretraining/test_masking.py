"""Tests masks: exact counts, blocks, and the proportions of BERT."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_ds.tasks.pretraining.masking import block_mask, mask_tokens, mask_words
from beit3_ds.tokenizers.text import WordBorders

MASK_ID = 1001


@settings(max_examples=250, deadline=None)
@given(data=st.data(), grid_size=st.integers(1, 20), seed=st.integers(0, 2**32))
def test_block_mask_hides_the_exact_number(data: st.DataObject, grid_size: int, seed: int) -> None:
    num_masked = data.draw(st.integers(0, grid_size**2))
    rng = np.random.default_rng(seed)
    for mask in (block_mask(grid_size, num_masked, rng) for _ in range(8)):
        # catches a missing top-up, and an overlap counted twice
        assert (mask.shape, mask.dtype, int(mask.sum())) == ((grid_size**2,), np.bool_, num_masked)


@pytest.mark.parametrize(("grid_size", "num_masked"), [(14, 78), (16, 102)])
def test_the_papers_counts_are_exact(grid_size: int, num_masked: int) -> None:
    rng = np.random.default_rng(0)
    assert {int(block_mask(grid_size, num_masked, rng).sum()) for _ in range(1000)} == {num_masked}


def _hidden_neighbours(mask: np.ndarray, grid_size: int) -> float:
    """Returns the share of masked patches among the right neighbours of masked patches."""
    grid = mask.reshape(grid_size, grid_size)
    return float((grid[:, 1:] & grid[:, :-1]).sum() / grid[:, :-1].sum())


@pytest.mark.parametrize(("grid_size", "num_masked"), [(16, 102), (8, 26)])
def test_mask_is_blocky(grid_size: int, num_masked: int) -> None:
    rng = np.random.default_rng(0)
    shares = [_hidden_neighbours(block_mask(grid_size, num_masked, rng), grid_size) for _ in range(300)]
    # catches random single patches (0.4), and a minimum block size too large for a small grid
    assert np.mean(shares) > 0.65


def test_mask_covers_the_image_evenly() -> None:
    rng = np.random.default_rng(0)
    covered = np.mean([block_mask(14, 78, rng) for _ in range(2000)], axis=0).reshape(14, 14)
    # catches blocks that never reach the last row or column; blocks favour the middle
    assert covered[-1].mean() == pytest.approx(covered[0].mean(), abs=0.02)
    assert covered[:, -1].mean() == pytest.approx(covered[:, 0].mean(), abs=0.02)
    assert covered.min() > 0.02


def _ids(length: int, rng: np.random.Generator) -> np.ndarray:
    return np.array([0, *rng.integers(4, MASK_ID, length - 2), 2])


@settings(max_examples=250, deadline=None)
@given(length=st.integers(2, 130), ratio=st.floats(0.01, 0.99), seed=st.integers(0, 2**32))
def test_mask_tokens_counts_and_positions(length: int, ratio: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = _ids(length, rng)
    before = ids.copy()
    corrupted, positions = mask_tokens(ids, ratio, MASK_ID, rng)
    assert len(positions) == max(1, min(round(length * ratio), length - 1))
    assert positions.min() >= 1  # catches a masked BOS
    assert (np.diff(positions) > 0).all()  # catches unsorted positions and draws with repetition
    kept = np.delete(np.arange(length), positions)
    assert np.array_equal(corrupted[kept], ids[kept])  # catches a corruption that is not predicted
    assert np.array_equal(ids, before)  # catches targets taken from ids that were overwritten
    assert corrupted[0] == 0


def test_eos_may_be_masked() -> None:
    rng = np.random.default_rng(0)
    ids = _ids(10, rng)
    share = np.mean([9 in mask_tokens(ids, 0.5, MASK_ID, rng)[1] for _ in range(2000)])
    assert share == pytest.approx(5 / 9, abs=0.05)  # catches an EOS left out or favoured


def test_eighty_ten_ten() -> None:
    rng = np.random.default_rng(0)
    ids = np.array([0, *[500] * 20_000, 2])
    corrupted, positions = mask_tokens(ids, 0.99, MASK_ID, rng)
    new, old = corrupted[positions], ids[positions]
    # deviation 0.003; catches exchanged fates, and fates drawn once for all tokens
    assert np.mean(new == MASK_ID) == pytest.approx(0.8, abs=0.015)
    assert np.mean(new == old) == pytest.approx(0.1, abs=0.015)
    random_pieces = new[(new != MASK_ID) & (new != old)]
    # catches special ids, or the mask itself, among the random pieces
    assert (random_pieces.min(), random_pieces.max()) == (4, MASK_ID - 1)


STARTS = np.arange(MASK_ID + 1) % 3 == 0  # every third piece starts a word


WORDS = WordBorders(STARTS, np.zeros_like(STARTS))


def _words(ids: np.ndarray) -> list[list[int]]:
    """Returns the positions of each word, by looking at one token at a time."""
    words: list[list[int]] = []
    for position in range(1, len(ids)):
        if position in (1, len(ids) - 1) or STARTS[ids[position]]:
            words.append([])
        words[-1].append(position)
    return words


@settings(max_examples=200, deadline=None)
@given(length=st.integers(2, 14), ratio=st.floats(0.01, 0.99), seed=st.integers(0, 2**32))
def test_whole_words_are_as_near_to_the_ratio_as_can_be(length: int, ratio: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = _ids(length, rng)
    before = ids.copy()
    corrupted, positions = mask_words(ids, ratio, MASK_ID, WORDS, rng)
    words = _words(ids)
    masked = set(positions.tolist())
    assert all(masked.issuperset(word) or masked.isdisjoint(word) for word in words)  # catches a word cut in two
    assert 0 not in masked
    sums = {
        sum(map(len, some)) for k in range(1, max(2, len(words))) for some in combinations(words, k)
    }  # neither none nor all
    target = max(1, min(round(length * ratio), length - 1))
    assert len(positions) == min(sums, key=lambda s: (abs(s - target), s))
    assert (np.diff(positions) > 0).all()
    kept = np.delete(np.arange(length), positions)
    assert np.array_equal(corrupted[kept], ids[kept])
    assert np.array_equal(ids, before)


def test_every_word_may_be_masked() -> None:
    rng = np.random.default_rng(0)
    ids = np.array([0, 6, 7, 9, 12, 13, 14, 15, 2])  # words of 2, 1, 3 and 1 tokens, and EOS
    draws = [mask_words(ids, 0.4, MASK_ID, WORDS, rng)[1] for _ in range(3000)]
    assert {len(positions) for positions in draws} == {4}
    shares = np.bincount(np.concatenate(draws), minlength=len(ids)) / len(draws)
    assert shares[0] == 0
    assert (shares[1:] > 0.15).all()  # catches words that are never chosen
    assert (shares[1:] < 0.85).all()


def test_whole_words_share_the_fates_of_tokens() -> None:
    rng = np.random.default_rng(0)
    ids = np.array([0, *[500] * 20_000, 2])  # 500 % 3 is not 0: one word, and EOS
    corrupted, positions = mask_words(ids, 0.99, MASK_ID, WORDS, rng)
    new, old = corrupted[positions], ids[positions]
    assert np.mean(new == MASK_ID) == pytest.approx(0.8, abs=0.015)  # catches one fate for a whole word
    assert np.mean(new == old) == pytest.approx(0.1, abs=0.015)


def test_words_are_whole_whatever_marks_their_borders() -> None:
    rng = np.random.default_rng(0)
    ends = np.arange(MASK_ID + 1) % 3 == 1
    ids = np.array([0, 6, 7, 9, 2, 11, 14, 10, 13, 5, 2])  # EOS also between two documents
    ends[2] = True
    starts = STARTS.copy()
    starts[2] = True
    cases = {
        "starts": (WordBorders(starts, np.arange(MASK_ID + 1) == 2), [[1, 2], [3], [4], [5, 6, 7, 8, 9], [10]]),
        "ends": (WordBorders(np.arange(MASK_ID + 1) == 2, ends), [[1, 2], [3], [4], [5, 6, 7], [8], [9], [10]]),
    }
    for borders, words in cases.values():
        for _ in range(50):
            masked = set(mask_words(ids, 0.4, MASK_ID, borders, rng)[1].tolist())
            # catches words cut in two where white space is marked behind them, and words joined over a separator
            assert all(masked.issuperset(word) or masked.isdisjoint(word) for word in words)
