"""Compares classes by name, and classes of a linear layer, with the models themselves."""

from pathlib import Path

import pytest
import torch

from beit3_ds.config import ConfigError
from beit3_ds.inference import DualEncoder, ImageClassifier
from beit3_ds.model.features import pack_inputs
from beit3_ds.preprocess import preprocess
from beit3_ds.tasks.imagenet.head import patch_rows
from tests.inference.weights import TEXTS, write_task_weights


def test_classes_by_name(spm: Path, photos: list[Path], tmp_path: Path) -> None:
    write_task_weights(tmp_path / "w", "retrieval", {"prompt": "a photo of {name}"})
    classifier = ImageClassifier.from_pretrained(tmp_path / "w", TEXTS, spm)
    similarities = DualEncoder.from_pretrained(tmp_path / "w", spm)(photos, [f"a photo of {text}" for text in TEXTS])
    torch.testing.assert_close(classifier.probabilities(photos, batch_size=2), similarities.softmax(1))
    (best, second), *_ = classifier(photos, top=7)
    assert best.name == TEXTS[int(similarities[0].argmax())] and best.probability >= second.probability
    with pytest.raises(ConfigError, match="need a tokenizer"):
        ImageClassifier.from_pretrained(tmp_path / "w", TEXTS)
    with pytest.raises(ConfigError, match="Give a list with the name of each class"):
        ImageClassifier.from_pretrained(tmp_path / "w", [], spm)


def test_classes_of_a_linear_layer(photos: list[Path], tmp_path: Path) -> None:
    model = write_task_weights(tmp_path / "w", "imagenet", {"head": "linear"})
    names = ["tench", "crane", "crane"]  # ImageNet has two classes of this name
    classifier = ImageClassifier.from_pretrained(tmp_path / "w", names)
    pixels = torch.stack([preprocess(photo, 16, crop=False) for photo in photos])
    batch = pack_inputs(model.config, pixels, None, None, torch.device("cpu"))
    picked = patch_rows(batch.layout)
    with torch.no_grad():
        logits = model.heads(model.run_layers(batch)[picked.rows], batch, False)
    torch.testing.assert_close(classifier.probabilities(photos, batch_size=2), logits.softmax(1))
    assert [found.name for found in classifier(photos[0], top=1)[0]] == [names[int(logits[0].argmax())]]
    with pytest.raises(ConfigError, match="has 3 classes, but there are 2 names"):
        ImageClassifier.from_pretrained(tmp_path / "w", names[:2])
