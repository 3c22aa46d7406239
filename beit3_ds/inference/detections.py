"""Detects objects in image files, draws the objects, and writes them as a COCO annotation file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from beit3_ds.atomic_file import atomic_write
from beit3_ds.config import ConfigError
from beit3_ds.inference.detector import Detector
from beit3_ds.inference.predictions import Prediction, broken_images, rounded
from beit3_ds.tasks.detection.records import DetectionRecord


def detect_objects(
    detector: Detector, images: Sequence[Path], pictures: Path, coco: Path | None, least_score: float
) -> list[Prediction]:
    """Detects the objects in images, and draws them with boxes, masks and categories into one picture per image.

    Args:
        detector: the model.
        images: image files; their names without extensions must differ.
        pictures: folder for the pictures; created if missing.
        coco: path of a COCO annotation file to write, with all detections and their scores. With None, no file is
            written.
        least_score: minimum score of detections that are drawn and returned.

    Returns:
        One prediction per image, with the detections in descending order of score.

    Raises:
        ConfigError: if an image is broken, or two images have the same name without extension.
    """
    names = [image.stem for image in images]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ConfigError(
            f"two images have the name {min(repeated)}, and each picture gets the name of its image. Pass them one by "
            "one."
        )
    pictures.mkdir(parents=True, exist_ok=True)
    predictions, records = [], []
    for image in images:
        with broken_images():
            (record,) = detector([image])
        drawn = pictures / f"{image.stem}.png"
        detector.draw(image, record, least_score).save(drawn)
        records.append(record)
        predictions.append(_predict(detector, image, drawn, record, least_score))
    if coco is not None:
        content = coco_dataset(detector, images, records)
        with atomic_write(coco) as file:
            file.write(json.dumps(content).encode())
    return predictions


def coco_dataset(detector: Detector, images: Sequence[Path], records: Sequence[DetectionRecord]) -> dict[str, Any]:
    """Returns detections as the content of a COCO annotation file; each annotation also has a score.

    Args:
        detector: the model, for the names of the categories.
        images: image files; they are numbered from 1.
        records: detections in each image.
    """
    entries: list[dict[str, Any]] = []
    category_ids = [category.identifier for category in detector.categories]
    for number, record in enumerate(records, 1):
        boxes = record.entries(number, category_ids, "bbox")
        masks = record.entries(number, category_ids, "segm") if record.counts is not None else [{}] * len(record)
        for box, mask in zip(boxes, masks, strict=True):
            area = box["bbox"][2] * box["bbox"][3]
            entries.append({"id": len(entries) + 1, **box, **mask, "iscrowd": 0, "area": area})
    described = [
        {"id": number, "file_name": image.name, "height": record.size[0], "width": record.size[1]}
        for number, (image, record) in enumerate(zip(images, records, strict=True), 1)
    ]
    return {"images": described, "categories": detector.categories.as_json(), "annotations": entries}


def _predict(detector: Detector, image: Path, drawn: Path, record: DetectionRecord, least_score: float) -> Prediction:
    names = detector.categories.names
    shown = [place for place, score in enumerate(record.scores) if score >= least_score]
    found = [
        {
            "category": names[record.labels[place]],
            "score": rounded(record.scores[place]),
            "box": [rounded(value) for value in record.boxes[place]],
        }
        for place in shown
    ]
    return Prediction(
        images=[image, drawn],
        title=image.name,
        lines={"objects": ", ".join(f"{entry['category']} ({entry['score']:.0%})" for entry in found) or "none"},
        record={"image": str(image), "picture": str(drawn), "objects": found},
    )
