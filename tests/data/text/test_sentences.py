"""Tests the starts of sentences among token ids, and the division of long paragraphs."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_ds.config import TextTokenizerConfig
from beit3_ds.data.text.sentences import ParagraphCutter
from beit3_ds.data.text.sequences import TextSequences
from beit3_ds.tokenizers.text import TextTokenizer, train_text_tokenizer

WORDS = ("red", "bird", "3.5", "boats", "u.s", "don't", "(old", "?q=1", "extraordinarily", "well-known")
ENDS = (".", "!", "?", "...", "?!", '."', '!"', ".)", ".\u201d", "?'", '.")')


@pytest.fixture(scope="module")
def punctuated(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """Trains a tokenizer with punctuation marks alone and after letters, and with East Asian characters."""
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(np.array(WORDS), 8)) + str(rng.choice(np.array(ENDS))) for _ in range(400)]
    lines += ["我是鸟。你是船!他说「好。」我也是", "bird? boats?", ".?!' \"()\u201d,"] * 9
    path = tmp_path_factory.mktemp("tokenizer") / "text.spm"
    config = TextTokenizerConfig(path=str(path), vocab_size=60, character_coverage=1.0)
    return train_text_tokenizer(config, lines)


sentences = st.lists(
    st.tuples(st.lists(st.sampled_from(WORDS), min_size=1, max_size=12), st.sampled_from(ENDS)), min_size=1, max_size=9
).map(lambda drawn: [" ".join(words) + end for words, end in drawn])


def _ids(text: str, tokenizer: TextTokenizer) -> np.ndarray:
    return np.array(tokenizer.encode(text), dtype=np.uint16)


def _starts(parts: list[str], tokenizer: TextTokenizer) -> set[int]:
    """Encodes parts one by one; returns the start of each part but the first among the ids of all parts."""
    return set(np.cumsum([len(tokenizer.encode(part)) for part in parts])[:-1].tolist())


@settings(max_examples=200, deadline=None)
@given(texts=sentences)
def test_sentences_start_where_the_text_has_them(punctuated: TextTokenizer, texts: list[str]) -> None:
    ids = _ids(" ".join(texts), punctuated)
    # catches an end inside "3.5" or "?q=1", and one that closing marks hide
    assert set(ParagraphCutter(punctuated).sentence_starts(ids, np.array([len(ids)])).tolist()) == _starts(
        texts, punctuated
    )


def test_pieces_that_end_words_are_cut_between_words_and_sentences(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(np.array(WORDS), 8)) + str(rng.choice(np.array([".", "!"]))) for _ in range(400)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(tmp_path / "m"),
        vocab_size=60,
        minloglevel=2,
        hard_vocab_limit=False,
        treat_whitespace_as_suffix=True,
    )
    tokenizer = TextTokenizer(tmp_path / "m.model")
    cutter = ParagraphCutter(tokenizer)
    parts = ["red 3.5 boats.", "u.s bird!", "old red ?q=1 boats."]
    ids = _ids(" ".join(parts), tokenizer)
    borders = [0, *cutter.sentence_starts(ids, np.array([len(ids)])).tolist(), len(ids)]
    assert [tokenizer.decode(ids[start:stop]) for start, stop in pairwise(borders)] == parts
    text = "red bird boats " * 20
    ids = _ids(text, tokenizer)
    cuts = [0, *cutter.cuts(ids, np.array([len(ids)]), 7), len(ids)]
    # catches words cut in two, because no piece starts one
    assert [
        word for start, stop in pairwise(cuts) for word in tokenizer.decode(ids[start:stop]).split()
    ] == text.split()


@pytest.mark.parametrize(
    "expected",
    [
        ["我是鸟。", "你是船!", "他说「好。」", "我也是"],  # no white space
        ["我是鸟。", "bird?boats"],  # no sentence: Latin without white space
        ["我是鸟。。", "3.5"],  # a second mark starts nothing
        ["我是鸟!。", "他说(「好。」)", "我也是"],
    ],
)
def test_east_asian_sentences(punctuated: TextTokenizer, expected: list[str]) -> None:
    ids = _ids("".join(expected), punctuated)
    borders = [0, *ParagraphCutter(punctuated).sentence_starts(ids, np.array([len(ids)])).tolist(), len(ids)]
    found = [punctuated.decode(ids[a:b].tolist()) for a, b in pairwise(borders)]
    assert found == expected


@settings(max_examples=300, deadline=None)
@given(texts=sentences, limit=st.integers(1, 40))
def test_long_paragraphs_are_cut_at_sentences_then_words(
    punctuated: TextTokenizer, texts: list[str], limit: int
) -> None:
    ids = _ids(" ".join(texts), punctuated)
    sentence_starts, word_starts = _starts(texts, punctuated), _starts(" ".join(texts).split(), punctuated)
    borders = [0, *ParagraphCutter(punctuated).cuts(ids, np.array([len(ids)]), limit), len(ids)]
    for start, stop in pairwise(borders):
        assert 0 < stop - start <= limit
        if stop == len(ids):
            break
        assert len(ids) - start > limit  # catches a cut of what fits
        window = range(start + 1, start + limit + 1)
        # catches a sentence that is cut although its start would do, and one cut off although it fits whole
        fitting = sentence_starts.intersection(window) or word_starts.intersection(window) or {start + limit}
        assert stop == max(fitting)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), limit=st.integers(1, 9))
def test_paragraphs_are_cut_as_if_alone(punctuated: TextTokenizer, data: st.DataObject, limit: int) -> None:
    marks = [punctuated.encode(f"x{mark}")[-1] for mark in ".?'\")。"]
    some_ids = st.one_of(st.sampled_from(marks), st.integers(3, punctuated.vocab_size - 1))
    paragraphs = data.draw(st.lists(st.lists(some_ids, max_size=20), min_size=1))
    lengths = np.array([len(paragraph) for paragraph in paragraphs])
    cutter, expected = ParagraphCutter(punctuated), []
    for first, paragraph in zip(np.cumsum(lengths) - lengths, paragraphs, strict=True):
        alone = cutter.cuts(np.array(paragraph, dtype=np.int64), np.array([len(paragraph)]), limit)
        expected += [int(first) + cut for cut in alone]
    # catches an end that closing marks of the next paragraph move there
    assert (
        list(cutter.cuts(np.array([id_ for ids in paragraphs for id_ in ids], dtype=np.int64), lengths, limit))
        == expected
    )


def test_texts_are_cut_at_sentences(tmp_path: Path, punctuated: TextTokenizer) -> None:
    texts = ["red bird boats.", "bird bird?", "don't (old boats!)", "boats boats boats boats."]
    (tmp_path / "a.txt").write_text(" ".join(texts) + "\nred\n")
    limit = max(len(punctuated.encode(text)) for text in texts)
    sequences = TextSequences([str(tmp_path / "a.txt")], punctuated, limit + 2)
    found = [punctuated.decode(sequences[i][1:-1].tolist()) for i in range(len(sequences))]
    ends = [text.split()[-1] for text in (*texts, "red")]
    assert all(text.split()[-1] in ends for text in found)  # catches cuts that are made but not used
    assert " ".join(found) == " ".join([*texts, "red"])
