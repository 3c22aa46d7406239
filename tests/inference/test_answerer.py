"""Compares the answerer with the VQA model itself."""

import dataclasses
from pathlib import Path

import pytest
import torch

from beit3_ds.config import ConfigError
from beit3_ds.inference import (
    QuestionAnswerer,
)
from beit3_ds.model.features import pack_inputs
from beit3_ds.preprocess import preprocess
from tests.inference.weights import ANSWERS, TEXTS, ids_of, write_task_weights

CPU = torch.device("cpu")


def test_question_answerer(spm: Path, photos: list[Path], tmp_path: Path) -> None:
    model = write_task_weights(tmp_path / "w", "vqa", {"num_answers": 4, "answers": ANSWERS})
    answerer = QuestionAnswerer.from_pretrained(tmp_path / "w", spm)
    pixels = torch.stack([preprocess(photo, 16, crop=False) for photo in photos[:2]])
    batch = pack_inputs(model.config, None, None, (pixels, [ids_of(spm, text) for text in TEXTS]), CPU)
    rows = batch.layout.first_rows(1)
    with torch.no_grad():
        scores = model(dataclasses.replace(batch, head_rows=rows.rows, head_row_counts=rows.counts), None).sigmoid()
    found = answerer(photos[:2], TEXTS, top=2, batch_size=1)
    for answers, expected in zip(found, scores, strict=True):
        assert [answer.text for answer in answers] == [ANSWERS[i] for i in expected.topk(2).indices]
        assert answers[0].score == pytest.approx(float(expected.max()), abs=1e-5)
    with pytest.raises(ConfigError, match="2 images and 1 questions"):
        answerer(photos[:2], TEXTS[0])

    write_task_weights(tmp_path / "none", "vqa", {"num_answers": 4})
    with pytest.raises(ConfigError, match=r"has no list of answers.*answer2label.txt"):
        QuestionAnswerer.from_pretrained(tmp_path / "none", spm)
    write_task_weights(tmp_path / "three", "vqa", {"num_answers": 4, "answers": ANSWERS[:3]})
    with pytest.raises(ConfigError, match="3 answers, but the head has 4"):
        QuestionAnswerer.from_pretrained(tmp_path / "three", spm)
