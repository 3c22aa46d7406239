"""Texts: no token lost, borders kept, and errors that name the file."""

from pathlib import Path

import numpy as np
import pytest

from beit3_ds.config import ConfigError
from beit3_ds.data.texts import TextSequences
from beit3_ds.tokenizers.text import TextTokenizer


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
    for name, reason in {"latin": "not UTF-8", "blank": "holds no text", "gone": "no file matches"}.items():
        with pytest.raises(ConfigError, match=reason) as error:
            TextSequences([str(tmp_path / f"{name}.txt")], tokenizer, 12)
        assert f"{name}.txt" in str(error.value)
