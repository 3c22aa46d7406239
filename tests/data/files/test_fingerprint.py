"""Tests that sources have different fingerprints if the numbering of their samples differs."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beit3_ds.config import SourceConfig
from beit3_ds.data.files.fingerprint import SourceFile, fingerprint, first_difference
from beit3_ds.data.sources import open_images
from beit3_ds.data.text.sequences import TextSequences
from beit3_ds.tokenizers import TextTokenizer

SAMPLE = Path("beit3_ds/sample_data")


class Listed(list[SourceFile]):
    """Implements a source from a list of files."""

    def files(self) -> Sequence[SourceFile]:
        return self


files = st.builds(SourceFile, st.text(max_size=3), st.none() | st.integers(0, 3), st.integers(0, 3))
sources = st.lists(files, max_size=4, unique_by=lambda file: file.name).map(Listed)


@given(sources, sources)
def test_equal_fingerprints_mean_equal_files(first: Listed, second: Listed) -> None:
    """Catches a fingerprint that ignores a name, a size, a number of samples or an order."""
    assert (fingerprint(first) == fingerprint(second)) == (first == second)
    if first != second:
        difference = first_difference(first, second, "rank 0")
        assert "another order" in difference or any(file.name in difference for file in first + second)


def place(folder: Path) -> Path:
    """Writes three shards, a folder of images, and a text."""
    for name in ("a", "b", "c"):
        (folder / "shards").mkdir(parents=True, exist_ok=True)
        shutil.copy(SAMPLE / "images-validation.tar", folder / "shards" / f"{name}.tar")
        (folder / "images").mkdir(exist_ok=True)
        (folder / "images" / f"{name}.jpg").write_bytes(b"no picture is opened")
    (folder / "text.txt").write_text("Some words.\n" * 20)
    return folder


def digests(folder: Path, tokenizer: TextTokenizer) -> dict[str, str]:
    images = {name: open_images(SourceConfig(path=str(folder / name)), None) for name in ("shards/*.tar", "images")}
    texts = TextSequences([str(folder / "text.txt")], tokenizer, 16)
    return {name: fingerprint(source)["digest"] for name, source in (images | {"text.txt": texts}).items()}


@pytest.mark.parametrize(
    ("path", "source"), [("shards/b.tar", "shards/*.tar"), ("images/b.jpg", "images"), ("text.txt", "text.txt")]
)
def test_real_sources(tokenizer_files: dict[str, str], tmp_path: Path, path: str, source: str) -> None:
    """Checks that a fingerprint depends on file names and lengths, but not on folders and modification times."""
    tokenizer = TextTokenizer(tokenizer_files["text"])
    first, second = place(tmp_path / "one"), place(tmp_path / "two")
    os.utime(second / path, (0, 0))
    before = digests(first, tokenizer)
    assert digests(second, tokenizer) == before
    if path == "text.txt":
        (second / path).write_text("Some words.\n" * 21)
    else:
        (second / path).rename((second / path).with_stem("d"))
    after = digests(second, tokenizer)
    assert {name for name, digest in after.items() if digest != before[name]} == {source}
