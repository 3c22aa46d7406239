"""Compares the dual encoder with the retrieval model itself."""

import dataclasses
from pathlib import Path

import torch

from beit3_ds.inference import (
    DualEncoder,
)
from beit3_ds.model.features import pack_inputs
from beit3_ds.preprocess import preprocess
from tests.inference.weights import TEXTS, ids_of, write_task_weights

CPU = torch.device("cpu")


def test_dual_encoder(spm: Path, photos: list[Path], tmp_path: Path) -> None:
    model = write_task_weights(tmp_path / "w", "retrieval")
    dual = DualEncoder.from_pretrained(tmp_path / "w", spm)
    assert dual.model.config.inputs == ("images", "texts")
    pixels = torch.stack([preprocess(photo, 16, crop=False) for photo in photos])
    batch = pack_inputs(model.config, pixels, [ids_of(spm, text) for text in TEXTS], None, CPU)
    rows = batch.layout.first_rows(0, 3)
    with torch.no_grad():
        output = model(dataclasses.replace(batch, head_rows=rows.rows, head_row_counts=rows.counts), None)
    torch.testing.assert_close(dual.encode_images(photos, batch_size=2), output.rows["image"])
    torch.testing.assert_close(dual.encode_texts(TEXTS), output.rows["text"])
    expected = output.shared["scale"] * output.rows["image"] @ output.rows["text"].T
    torch.testing.assert_close(dual(photos, TEXTS), expected)
    assert dual.encode_images([]).shape == (0, 24) and dual.encode_texts([]).shape == (0, 24)
