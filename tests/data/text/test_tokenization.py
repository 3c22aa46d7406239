"""Tests that paragraphs become ids and sequences without losing tokens or borders."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_ds.data.text import tokenization as tokenization
from beit3_ds.data.text.paragraphs import Paragraph
from beit3_ds.data.text.sentences import ParagraphCutter
from beit3_ds.data.text.tokenization import encode_paragraphs, sequence_starts, token_dtype
from beit3_ds.tokenizers.text import TextTokenizer


def _starts(lengths: list[int], limit: int, tokenizer: TextTokenizer, chunk_size: int = 99) -> list[int]:
    """Returns the starts of sequences for one-word paragraphs of the given token counts.

    Paragraphs are passed in chunks of `chunk_size`.
    """
    inside = int(np.flatnonzero(~tokenizer.word_borders().starts)[-1])
    chunks = [
        (np.full(sum(chunk), inside, dtype=np.uint16), np.array(chunk))
        for chunk in (lengths[i : i + chunk_size] for i in range(0, len(lengths), chunk_size))
    ]
    return list(sequence_starts(chunks, limit, ParagraphCutter(tokenizer)))


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 30), min_size=1), limit=st.integers(1, 12), chunk_size=st.integers(1, 9))
def test_sequences_are_bounded_and_whole(
    tokenizer: TextTokenizer, lengths: list[int], limit: int, chunk_size: int
) -> None:
    borders = [*_starts(lengths, limit, tokenizer, chunk_size), sum(lengths)]
    sizes = np.diff(borders)
    assert borders[0] == 0  # catches tokens lost at the start
    assert len(sizes) == 0 or (sizes.min() >= 1 and sizes.max() <= limit)
    assert borders == [*_starts(lengths, limit, tokenizer), sum(lengths)]  # catches a chunk that ends a sequence
    paragraph_borders = set(np.cumsum([0, *lengths]).tolist())
    for start in set(borders) - paragraph_borders:
        # catches a short paragraph cut in two
        assert lengths[int(np.searchsorted(np.cumsum(lengths), start, side="right"))] > limit


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([3, 3, 3], [0, 6]),  # the third does not fit whole
        ([4, 4], [0]),  # catches an off-by-one at exactly full
        ([20], [0, 8, 16]),
        ([2, 20, 3], [0, 2, 10, 18]),  # the rest of a long paragraph shares a sequence with the next one
        ([0, 5, 0], [0]),
        ([8, 8], [0, 8]),
    ],
)
def test_greedy_rule(tokenizer: TextTokenizer, lengths: list[int], expected: list[int]) -> None:
    assert _starts(lengths, 8, tokenizer) == expected


def test_chunks_of_paragraphs_join_to_what_each_gives(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    paragraphs = ["a red bird", "two green boats", "☃ near", "water " * 20, "snow"]
    expected = [tokenizer.encode(paragraph) for paragraph in paragraphs]
    monkeypatch.setattr(tokenization, "_CHUNK_PARAGRAPHS", 2)
    monkeypatch.setattr(tokenization, "_CHUNK_CHARACTERS", 100)
    chunks = list(encode_paragraphs((Paragraph(text, True) for text in paragraphs), tokenizer, False))
    assert [len(lengths) for _, lengths in chunks] == [2, 2, 1]  # catches a chunk without an end, and a lost last one
    assert [id_ for ids, _ in chunks for id_ in ids.tolist()] == [id_ for ids in expected for id_ in ids]
    assert [n for _, lengths in chunks for n in lengths.tolist()] == [len(ids) for ids in expected]


DOCUMENTS = st.lists(st.lists(st.sampled_from(["", "snow", "a red bird.", "two boats near water. " * 3]), max_size=4))


@settings(deadline=None)
@given(documents=DOCUMENTS, limit=st.integers(3, 20), chunk_size=st.integers(1, 5))
def test_documents_are_separated_inside_sequences_and_nowhere_else(
    tokenizer: TextTokenizer, documents: list[list[str]], limit: int, chunk_size: int
) -> None:
    paragraphs = [
        Paragraph(text, number == len(document)) for document in documents for number, text in enumerate(document, 1)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenization, "_CHUNK_PARAGRAPHS", chunk_size)
        chunks = list(encode_paragraphs(paragraphs, tokenizer, True))
    ids = [id_ for chunk, _ in chunks for id_ in chunk.tolist()]
    contents = [[id_ for text in document for id_ in tokenizer.encode(text)] for document in documents]
    expected = [content for content in contents if content]
    # catches a separator that is missing, doubled (a document of nothing), or in a wrong place
    assert ids == [id_ for content in expected for id_ in (*content, tokenizer.eos_id)]

    starts = list(sequence_starts(chunks, limit, ParagraphCutter(tokenizer)))
    plain = list(encode_paragraphs(paragraphs, tokenizer, False))
    for start, stop in itertools.pairwise([*starts, len(ids)]):
        sequence = ids[start:stop]
        inside = sequence[:-1] if sequence[-1] == tokenizer.eos_id else sequence
        assert 1 <= len(inside) <= limit  # catches a sequence of a separator alone, and one beyond its budget
        assert sequence[0] != tokenizer.eos_id
    if len(documents) == 1:  # then no separator takes room: catches a paragraph cut because of its own
        assert starts == list(sequence_starts(plain, limit, ParagraphCutter(tokenizer)))


def test_a_separator_takes_no_room_at_the_end(tokenizer: TextTokenizer) -> None:
    inside = int(np.flatnonzero(~tokenizer.word_borders().starts)[-1])
    document = [*[inside] * 4, tokenizer.eos_id]
    chunks = [(np.array(document * 3, dtype=np.uint16), np.array([5, 5, 5]))]
    cutter = ParagraphCutter(tokenizer)
    assert list(sequence_starts(chunks, 9, cutter)) == [0, 10]  # 4, EOS, 4: the last EOS is the sequence's own
    assert list(sequence_starts(chunks, 8, cutter)) == [0, 5, 10]  # catches a budget that leaves the separator out
    assert list(sequence_starts(chunks, 4, cutter)) == [0, 5, 10]  # catches a full paragraph cut for its separator
    assert list(sequence_starts(chunks, 3, cutter)) == [0, 3, 5, 8, 10, 13]


def test_ids_fit_their_type() -> None:
    assert token_dtype(1 << 16) == np.uint16
    assert token_dtype((1 << 16) + 1) == np.uint32  # catches ids that wrap around
