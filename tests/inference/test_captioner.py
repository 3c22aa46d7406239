"""Compares the captioner with the captioning model itself."""

from pathlib import Path

import torch

from beit3_ds.inference import (
    Captioner,
)
from beit3_ds.model.generation import BeamSearch, generate
from beit3_ds.preprocess import preprocess
from beit3_ds.tokenizers import TextTokenizer
from tests.inference.weights import write_task_weights


def test_captioner(spm: Path, photos: list[Path], tmp_path: Path) -> None:
    model = write_task_weights(tmp_path / "w", "captioning")
    captioner, search = Captioner.from_pretrained(tmp_path / "w", spm), BeamSearch(max_length=8)
    pixels = torch.stack([preprocess(photo, 16, crop=False) for photo in photos])
    tokenizer = TextTokenizer(spm)
    expected = [tokenizer.decode(caption.ids) for caption in generate(model, pixels, tokenizer, search)]
    assert captioner(photos, search, batch_size=2) == expected
    assert captioner(photos[1], search) == expected[1:2]
