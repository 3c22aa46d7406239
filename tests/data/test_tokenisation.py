"""Paragraphs to ids and to sequences: no token lost, borders kept."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beit3_ds.data import tokenisation
from beit3_ds.data.tokenisation import encode_paragraphs, sequence_starts, token_dtype
from beit3_ds.tokenizers.text import TextTokenizer


@given(lengths=st.lists(st.integers(0, 30), min_size=1), limit=st.integers(1, 12))
def test_sequences_are_bounded_and_whole(lengths: list[int], limit: int) -> None:
    borders = [*sequence_starts(lengths, limit), sum(lengths)]
    sizes = np.diff(borders)
    assert borders[0] == 0  # catches tokens lost at the start
    assert len(sizes) == 0 or (sizes.min() >= 1 and sizes.max() <= limit)
    paragraph_borders = set(np.cumsum([0, *lengths]).tolist())
    for start in borders[1:-1]:
        # catches a short paragraph cut in two: inside a paragraph, a cut leaves a long one
        inside = start not in paragraph_borders
        assert not inside or max(n for n, end in zip(lengths, np.cumsum(lengths), strict=True) if start < end) > limit


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([3, 3, 3], [0, 6]),  # the third does not fit whole
        ([4, 4], [0]),  # catches an off-by-one at exactly full
        ([20], [0, 8, 16]),
        ([2, 20, 3], [0, 2, 10, 18]),  # the rest of a long paragraph goes on with the next one
        ([0, 5, 0], [0]),
        ([8, 8], [0, 8]),
    ],
)
def test_greedy_rule(lengths: list[int], expected: list[int]) -> None:
    assert list(sequence_starts(lengths, 8)) == expected


def test_blocks_of_paragraphs_join_to_what_each_gives(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    paragraphs = ["a red bird", "two green boats", "☃ near", "water " * 20, "snow"]
    expected = [tokenizer.encode(paragraph) for paragraph in paragraphs]
    monkeypatch.setattr(tokenisation, "_BLOCK_PARAGRAPHS", 2)
    monkeypatch.setattr(tokenisation, "_BLOCK_CHARACTERS", 100)
    blocks = list(encode_paragraphs(iter(paragraphs), tokenizer))
    assert [len(lengths) for _, lengths in blocks] == [2, 2, 1]  # catches a block without an end, and a lost last one
    assert [id_ for ids, _ in blocks for id_ in ids.tolist()] == [id_ for ids in expected for id_ in ids]
    assert [n for _, lengths in blocks for n in lengths.tolist()] == [len(ids) for ids in expected]


def test_ids_fit_their_type() -> None:
    assert token_dtype(1 << 16) == np.uint16
    assert token_dtype((1 << 16) + 1) == np.uint32  # catches ids that wrap around
