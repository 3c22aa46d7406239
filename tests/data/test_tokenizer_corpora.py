"""Tests the text tokenizer's corpus: all training files, without broken records."""

from pathlib import Path

import pytest

from beit3_ds.data.tokenizer_corpora import read_training_lines
from tests.data.conftest import BuildConfig, WriteTar


def test_lines_are_texts_then_captions(
    build_config: BuildConfig, tmp_path: Path, write_tar: WriteTar, png: bytes
) -> None:
    (tmp_path / "text.txt").write_text("one\n\ntwo \n")
    pairs = write_tar(tmp_path / "pairs.tar", {"a.png": png, "a.txt": b"three", "b.png": png, "c.txt": b"four"})
    config = build_config(files={"texts": str(tmp_path / "text.txt"), "pairs": pairs})
    with pytest.warns(UserWarning, match=r"pairs\.tar:b: no caption"):
        assert list(read_training_lines(config.data)) == ["one", "two", "three", "four"]
