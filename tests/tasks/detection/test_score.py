"""Tests that average precision equals that of pycocotools on generated detections with every edge case."""

import contextlib
import io
from typing import Any

import numpy as np
import pytest
from faster_coco_eval import mask as coco_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from beit3_ds.sample_data.object_scenes import run_lengths
from beit3_ds.tasks.detection.categories import Categories, Category
from beit3_ds.tasks.detection.score import average_precision

HEIGHT, WIDTH = 200, 240
CATEGORIES = Categories([Category(identifier, f"kind {identifier}") for identifier in (1, 5, 17, 90)], "test")


def _mask(box: list[float]) -> np.ndarray[Any, Any]:
    left, top, width, height = (round(value) for value in box)
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[max(0, top) : top + height, max(0, left) : left + width] = True
    mask[max(0, top) : top + height // 2, max(0, left) : left + width // 3] = False
    return mask


def _box(rng: np.random.Generator) -> list[float]:
    side = float(rng.choice([8, 20, 60, 130]))
    return [*(rng.uniform(0, 100, 2)).tolist(), *(side * rng.uniform(0.6, 1.4, 2)).tolist()]


def generate(seed: int, num_images: int = 12) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    """Generates images without objects or detections, crowds, ties, over 100 detections and an unseen category."""
    rng = np.random.default_rng(seed)
    images = [{"id": 3 + 7 * i, "height": HEIGHT, "width": WIDTH} for i in range(num_images)]
    annotations: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    masks: list[dict[str, Any]] = []
    for number, image in enumerate(images):
        for _ in range(0 if number == 0 else int(rng.integers(1, 8))):
            box, category = _box(rng), int(rng.choice([1, 5, 17]))
            mask, is_crowd = _mask(box), int(rng.random() < 0.15)
            counts: Any = run_lengths(mask)
            annotation = {"id": len(annotations) + 1, "image_id": image["id"], "category_id": category, "bbox": box}
            segmentation = {"size": [HEIGHT, WIDTH], "counts": counts}
            annotations.append(
                annotation | {"iscrowd": is_crowd, "area": int(mask.sum()), "segmentation": segmentation}
            )
        own = [annotation for annotation in annotations if annotation["image_id"] == image["id"]]
        count = {1: 0, 2: 130}.get(number, int(rng.integers(0, 15)))
        for _ in range(count):
            base = rng.choice(own)["bbox"] if own and rng.random() < 0.7 else _box(rng)
            box = [value + float(rng.normal(0, 3)) for value in base[:2]] + list(base[2:])
            head = {"image_id": image["id"], "category_id": int(rng.choice([1, 5, 17, 90]))}
            head["score"] = float(rng.choice([0.1, 0.5, 0.9])) if rng.random() < 0.3 else float(rng.random())
            boxes.append(head | {"bbox": box})
            encoded = coco_masks.encode(np.asfortranarray(_mask(box).astype(np.uint8)))
            counts = encoded["counts"].decode()
            masks.append(head | {"segmentation": {"size": [HEIGHT, WIDTH], "counts": counts}})
    return images, annotations, boxes, masks


def official(images: list[Any], annotations: list[Any], entries: list[Any], kind: str) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {"images": images, "annotations": annotations, "categories": CATEGORIES.as_json()}
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(entries), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


NAMES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_it_equals_pycocotools(kind: str, seed: int) -> None:
    images, annotations, boxes, masks = generate(seed)
    entries = boxes if kind == "bbox" else masks
    found = average_precision(images, annotations, CATEGORIES, entries, kind)
    expected = official(images, annotations, entries, kind)
    for name, value in zip(NAMES, expected.stats[:6], strict=True):
        assert found.values.get(name, -1) == pytest.approx(value, abs=1e-12), name
    assert found.values["AR"] == pytest.approx(expected.stats[8], abs=1e-12)
    precision = expected.eval["precision"]
    for label, of_class in enumerate(found.classes):
        own = precision[:, :, label, 0, -1]
        value = float(own[own > -1].mean()) if (own > -1).any() else None
        assert of_class.values["AP"] == (None if value is None else pytest.approx(value, abs=1e-12))
    assert found.classes[-1].values["AP"] is None and found.classes[-1].objects == 0
    crowds = sum(annotation["iscrowd"] for annotation in annotations)
    assert crowds and sum(of_class.objects for of_class in found.classes) == len(annotations) - crowds


def test_no_detections_score_zero() -> None:
    images, annotations, _, _ = generate(0)
    found = average_precision(images, annotations, CATEGORIES, [], "bbox")
    assert found.values["AP"] == 0 and found.values["AR"] == 0
