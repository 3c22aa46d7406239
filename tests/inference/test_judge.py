"""Compares the judge with the NLVR2 model itself."""

import dataclasses
from pathlib import Path

import pytest
import torch

from beit3_ds.config import ConfigError
from beit3_ds.inference import (
    StatementJudge,
)
from beit3_ds.model.features import pack_inputs
from beit3_ds.preprocess import preprocess
from tests.inference.weights import TEXTS, ids_of, write_task_weights

CPU = torch.device("cpu")


def test_statement_judge(spm: Path, photos: list[Path], tmp_path: Path) -> None:
    model = write_task_weights(tmp_path / "w", "nlvr2")
    judge = StatementJudge.from_pretrained(tmp_path / "w", spm)
    order = [0, 1, 2, 0]  # left and right of both statements
    pixels = torch.stack([preprocess(photos[i], 16, crop=False) for i in order])
    ids = [ids_of(spm, text) for text in (TEXTS[0], TEXTS[0], TEXTS[1], TEXTS[1])]
    batch = pack_inputs(model.config, None, None, (pixels, ids), CPU)
    rows = batch.layout.first_rows(1, 2)
    with torch.no_grad():
        expected = model(dataclasses.replace(batch, head_rows=rows.rows, head_row_counts=rows.counts), None)
    found = judge([photos[0], photos[2]], [photos[1], photos[0]], TEXTS, batch_size=1)
    torch.testing.assert_close(found, expected.softmax(1)[:, 1])
    with pytest.raises(ConfigError, match="Give two images per statement"):
        judge(photos, photos[0], TEXTS)
