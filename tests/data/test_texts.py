"""Texts: no token lost, borders kept, and errors that name the file."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beit3_ds.config import ConfigError
from beit3_ds.data.texts import TextSequences, sequence_starts
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
    assert sequence_starts(lengths, 8) == expected


def test_all_tokens_of_all_files_come_back_in_order(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    texts = {"b.txt": ["a red bird", "two green boats near water " * 5], "a.txt": ["snow on trees"]}
    for name, paragraphs in texts.items():
        (tmp_path / name).write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    sequences = TextSequences([str(tmp_path / "*.txt")], tokenizer, 12)
    rows = [sequences[i] for i in range(len(sequences))]
    assert all(row[0] == tokenizer.bos_id and row[-1] == tokenizer.eos_id and len(row) <= 12 for row in rows)
    expected = [token for name in sorted(texts) for paragraph in texts[name] for token in tokenizer.encode(paragraph)]
    # catches a lost last sequence, and tokens of one file in another
    assert np.concatenate([row[1:-1] for row in rows]).tolist() == expected
    assert rows[0].dtype == np.int64
    names = [Path(sequences.name(i)).name for i in range(len(sequences))]
    assert names[:3] == ["a.txt:0", "b.txt:0", "b.txt:1"]


def test_files_that_cannot_be_used_are_named(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\xe9 au lait".encode("latin-1"))
    (tmp_path / "blank.txt").write_text("\n \n")
    for name, reason in {"latin": "is not UTF-8", "blank": "holds no text", "gone": "no file matches"}.items():
        with pytest.raises(ConfigError, match=reason) as error:
            TextSequences([str(tmp_path / f"{name}.txt")], tokenizer, 12)
        assert f"{name}.txt" in str(error.value)
