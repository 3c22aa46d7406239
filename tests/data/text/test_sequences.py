"""Tests sequences of text files: no token lost, borders kept, and errors that name the file."""

import json
from pathlib import Path

import numpy as np
import pytest

from beit3_ds.config import ConfigError
from beit3_ds.data.text.sequences import TextSequences
from beit3_ds.tokenizers.text import TextTokenizer


def test_all_tokens_of_all_files_come_back_in_order(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    texts = {"b.txt": ["a red bird", "two green boats near water " * 5], "a.txt": ["snow on trees"]}
    for name, paragraphs in texts.items():
        (tmp_path / name).write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    sequences = TextSequences([str(tmp_path / "*.txt")], tokenizer, 12, document_separator=False)
    rows = [sequences[i] for i in range(len(sequences))]
    assert all(row[0] == tokenizer.bos_id and row[-1] == tokenizer.eos_id and len(row) <= 12 for row in rows)
    expected = [token for name in sorted(texts) for paragraph in texts[name] for token in tokenizer.encode(paragraph)]
    # catches a lost last sequence, and tokens of one file in another
    assert np.concatenate([row[1:-1] for row in rows]).tolist() == expected
    assert rows[0].dtype == np.int64
    names = [Path(sequences.name(i)).name for i in range(len(sequences))]
    assert names[:3] == ["a.txt:0", "b.txt:0", "b.txt:1"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_documents_that_share_a_sequence_are_separated(tmp_path: Path, tokenizer: TextTokenizer, name: str) -> None:
    documents = ["a red bird\nsits left", "snow", "two green boats"]
    plain = "\n\n".join(documents)
    (tmp_path / name).write_text(
        plain if name == "a.txt" else "\n".join(json.dumps({"text": document}) for document in documents)
    )
    encoded = [[id_ for text in document.split("\n") for id_ in tokenizer.encode(text)] for document in documents]
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    (separated,) = TextSequences([str(tmp_path / name)], tokenizer, 200)
    # catches fused documents, a mark between paragraphs of one document, and a doubled EOS at the end
    assert separated.tolist() == [bos, *encoded[0], eos, *encoded[1], eos, *encoded[2], eos]
    (joined,) = TextSequences([str(tmp_path / name)], tokenizer, 200, document_separator=False)
    assert joined.tolist() == [bos, *encoded[0], *encoded[1], *encoded[2], eos]


def test_an_empty_file_among_others_is_named(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    for name, text in {"0": "", "1": "snow", "2": "\n \n", "3": "a red bird"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    sequences = TextSequences([str(tmp_path / "*.txt")], tokenizer, 12)
    assert [Path(sequences.name(i)).name for i in range(len(sequences))] == ["1.txt:0", "3.txt:0"]
    assert [Path(path).name for path in sequences.empty] == ["0.txt", "2.txt"]
    with pytest.raises(ConfigError, match=r"no text in .*0\.txt and 1 more"):
        TextSequences([str(tmp_path / "[02].txt")], tokenizer, 12)


def test_files_that_cannot_be_used_are_named(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\xe9 au lait".encode("latin-1"))
    (tmp_path / "blank.txt").write_text("\n \n")
    for name, reason in {"latin": "not UTF-8", "blank": "no text in", "gone": "no file matches"}.items():
        with pytest.raises(ConfigError, match=reason) as error:
            TextSequences([str(tmp_path / f"{name}.txt")], tokenizer, 12)
        assert f"{name}.txt" in str(error.value)
