"""Provides fixtures for the tests of inference."""

from pathlib import Path

import pytest

from tests.inference.weights import draw_photo


@pytest.fixture
def spm(tokenizer_files: dict[str, str]) -> Path:
    """Returns the path of a small text tokenizer."""
    return Path(tokenizer_files["text"])


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Writes three pictures; returns their paths."""
    return [draw_photo(tmp_path / f"{seed}.png", seed) for seed in range(3)]
