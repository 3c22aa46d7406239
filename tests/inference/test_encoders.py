"""Compares each encoder with the whole model, and checks which tensors it loads."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from beit3_ds.config import ConfigError
from beit3_ds.inference import (
    FusionEncoder,
    LanguageEncoder,
    VisionEncoder,
)
from beit3_ds.preprocess import preprocess
from beit3_ds.weights.export import export_weights
from tests.batches import small_model_config
from tests.inference.weights import TEXTS, ids_of
from tests.weights.models import ModelReader, exported, random_model


def test_encoders_of_pretrained_weights(spm: Path, photos: list[Path], tmp_path: Path) -> None:
    """Compares each encoder with the whole model, and checks which tensors it loads."""
    whole = random_model(small_model_config(text_vocab_size=310))
    path = exported(whole, tmp_path / "weights.safetensors")
    pixels = torch.stack([preprocess(photo, 16) for photo in photos])
    vision, language, fusion = VisionEncoder.from_pretrained(path), LanguageEncoder.from_pretrained(path, spm), None
    fusion = FusionEncoder.from_pretrained(path, spm)
    ids = [ids_of(spm, text) for text in TEXTS]
    with torch.no_grad():
        features = whole.encode(pixels, ids, (pixels[:2], ids))
    assert torch.equal(vision(photos), features.images)
    assert torch.equal(vision(photos, batch_size=2), features.images)
    for image in (photos[0], str(photos[0]), photos[0].read_bytes(), Image.open(photos[0]), pixels[0]):
        torch.testing.assert_close(vision(image), features.images[:1])
    torch.testing.assert_close(tuple(language(TEXTS)), features.texts)
    torch.testing.assert_close(language(TEXTS[0])[0], features.texts[0])
    pair = fusion(photos[:2], TEXTS, batch_size=1)
    torch.testing.assert_close(pair.images, features.pair_images)
    torch.testing.assert_close(pair.texts, features.pair_texts)
    kinds = [encoder.model.config.inputs for encoder in (vision, language, fusion)]
    assert kinds == [("images",), ("texts",), ("pairs",)]
    assert not any(parameter.requires_grad for parameter in vision.model.parameters()) and not vision.model.training
    squeezed = VisionEncoder.from_pretrained(path, crop=False, image_size=24)
    with torch.no_grad():
        expected = squeezed.model.encode(preprocess(photos[0], 24, crop=False)[None]).images
    assert torch.equal(squeezed(photos[0]), expected) and expected.shape[1] == 37
    assert vision([]).shape == (0, 17, 24) and language([]) == []


def test_files_of_other_formats(photos: list[Path], spm: Path, tmp_path: Path) -> None:
    """Checks that files exported for other projects load without an import."""
    whole = random_model(small_model_config(text_vocab_size=310))
    export_weights(ModelReader(whole), tmp_path / "dual.pth", format="unilm-dual")
    export_weights(ModelReader(whole), tmp_path / "vision.safetensors", format="timm")
    expected = VisionEncoder.from_pretrained(exported(whole, tmp_path / "own"))(photos)
    for name in ("dual.pth", "vision.safetensors"):
        torch.testing.assert_close(VisionEncoder.from_pretrained(tmp_path / name)(photos), expected)
    with pytest.raises(ConfigError, match="holds a vision tower alone"):
        LanguageEncoder.from_pretrained(tmp_path / "vision.safetensors", spm)
