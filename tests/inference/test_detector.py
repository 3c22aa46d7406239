"""Tests that `beit3 predict detect` draws detections, and writes them in COCO's format as the task reads it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from beit3_ds.cli.main import main
from beit3_ds.config import ConfigError, ModelConfig
from beit3_ds.config.dense import DenseConfig
from beit3_ds.inference import Detector
from beit3_ds.model import TaskModel
from beit3_ds.tasks.detection.config import DetectionConfig
from beit3_ds.tasks.detection.files import read_objects
from beit3_ds.tasks.detection.head import DetectionHead
from beit3_ds.tasks.detection.records import decode_mask
from beit3_ds.tasks.detection.segmentations import whole_segmentation
from beit3_ds.weights.export import export_weights
from tests.inference.weights import draw_photo, write_task_weights
from tests.weights.models import ModelReader

CATEGORIES = [[3, "dog"], [17, "cat"]]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = ModelConfig(
        num_layers=1,
        hidden_size=16,
        ffn_hidden_size=16,
        num_attention_heads=2,
        patch_size=8,
        image_size=32,
        num_vision_language_layers=0,
        inputs=("images",),
        dense=DenseConfig(window_size=2),
    )
    settings: dict[str, Any] = {"num_classes": 2, "pyramid_channels": 8, "box_width": 16, "anchor_scale": 2.0}
    settings |= {"proposals": 20, "proposals_per_level": 20, "max_detections": 8, "score_threshold": 0.0}
    model = TaskModel(lambda sizes, tensor: DetectionHead(sizes, DetectionConfig(**settings), 2, tensor), config)
    model.initialize(3)
    reader, path = ModelReader(model), tmp_path_factory.mktemp("weights") / "detector"
    reader.task = {"name": "detection", **settings, "categories": CATEGORIES}
    export_weights(reader, path)
    return path


def test_it_draws_and_writes_coco_files(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    photos = [draw_photo(tmp_path / "photos" / f"{seed}.png", seed) for seed in range(2)]
    out, page, coco, pictures = (tmp_path / name for name in ("out.json", "page.html", "coco.json", "pictures"))
    arguments = ["predict", "detect", str(weights), str(tmp_path / "photos"), "--pictures", str(pictures)]
    arguments += ["--coco", str(coco), "--out", str(out), "--page", str(page), "--least-score", "0"]
    assert main(arguments) == 0
    detector = Detector.from_pretrained(weights)
    records = detector(photos)
    assert [found["objects"] for found in json.loads(out.read_text())] == [
        [
            {
                "category": detector.categories.names[label],
                "score": pytest.approx(score, rel=1e-5),
                "box": pytest.approx(box, rel=1e-5),
            }
            for label, score, box in zip(record.labels, record.scores, record.boxes, strict=True)
        ]
        for record in records
    ]
    assert all(Image.open(pictures / photo.name).size == (32, 20) for photo in photos)
    assert "data:image/jpeg" in page.read_text()
    opened = read_objects(str(coco), str(tmp_path / "photos"), with_masks=True)
    assert opened.categories.names == ["dog", "cat"]
    for index, record in enumerate(records):
        objects = opened.objects(index)
        assert len(objects) == len(record.scores) == 8 and record.counts is not None
        for found, counts in zip(objects, record.counts, strict=True):
            assert found.segmentation is not None
            assert np.array_equal(whole_segmentation(found.segmentation, (20, 32)), decode_mask(counts, (20, 32)))


def test_views_can_be_chosen(weights: Path, tmp_path: Path) -> None:
    photo = draw_photo(tmp_path / "photo.png")
    one = Detector.from_pretrained(weights)([photo])[0]
    many = Detector.from_pretrained(weights, test_sizes=(32, 48), test_flip=True)([photo])[0]
    assert len(one) == len(many) == 8 and one.boxes != many.boxes


def test_images_of_one_pixel_and_broken_ones(weights: Path, tmp_path: Path) -> None:
    detector = Detector.from_pretrained(weights)
    for size in ((1, 1), (1, 400), (400, 1)):
        (record,) = detector([Image.new("RGB", size, "blue")])
        assert record.size == size[::-1]
    (tmp_path / "a.png").write_bytes(b"no image")
    pictures = ["--pictures", str(tmp_path / "pictures")]
    assert main(["predict", "detect", str(weights), str(tmp_path / "a.png"), *pictures]) == 2


def test_weights_of_another_task_are_refused(tmp_path: Path) -> None:
    write_task_weights(tmp_path / "w", "nlvr2")
    with pytest.raises(ConfigError, match="nlvr2, without a head that detects objects"):
        Detector.from_pretrained(tmp_path / "w")


def test_the_class_layers_can_be_left_out(weights: Path, tmp_path: Path) -> None:
    """Checks a detector whose class layers are left out, as for COCO after the intermediate stage on Objects365."""
    out = tmp_path / "body.safetensors"
    pattern = "heads.boxes.stages.*.classes.*"
    assert main(["export", str(weights), str(out), "--leave-out", pattern]) == 0
    from safetensors import safe_open

    with safe_open(out, "pt") as file:
        names = set(file.keys())
    assert not any(".classes." in name for name in names) and "heads.boxes.stages.0.deltas.bias" in names
    for wrong in ("heads.nothing.*", "blocks.*"):
        assert main(["export", str(weights), str(tmp_path / "x.safetensors"), "--leave-out", wrong]) == 2
