"""Fixtures of the tests of trained weights in use."""

from pathlib import Path

import pytest

from tests.inference.weights import draw_photo


@pytest.fixture
def spm(tokenizer_files: dict[str, str]) -> Path:
    """Returns the file of a small text tokenizer."""
    return Path(tokenizer_files["text"])


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Writes three pictures."""
    return [draw_photo(tmp_path / f"{seed}.png", seed) for seed in range(3)]
