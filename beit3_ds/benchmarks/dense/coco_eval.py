"""Compares this project's computation of COCO average precision with pycocotools, in CPU time of one process."""

import contextlib
import io
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from beit3_ds.config import ConfigError
from beit3_ds.tasks.detection.categories import Categories, Category
from beit3_ds.tasks.detection.score import average_precision
from beit3_ds.tasks.detection.segmentations import import_masks

NUM_IMAGES, DETECTIONS_PER_IMAGE = 150, 49
"""Default size of the comparison: 150 images with 49 detections each, 7,350 detections in total."""

_HEIGHT, _WIDTH, _NUM_CATEGORIES, _OBJECTS_PER_IMAGE = 480, 640, 80, 7
_KINDS = ("bbox", "segm")


def measure_coco_eval(rounds: int = 3, num_images: int = NUM_IMAGES, seed: int = 0) -> dict[str, Any]:
    """Times the evaluation of generated boxes and masks, with this project and with pycocotools in turn.

    Args:
        rounds: evaluations per implementation; the result is the median.
        num_images: number of images, each with 49 detections.
        seed: seed of the random objects and detections.

    Returns:
        Numbers by name. `ratio_coco_eval` is pycocotools' CPU time for boxes and masks together, divided by this
        project's CPU time. `ratio_bbox` is the same ratio for boxes alone, and `ratio_segm` for masks alone. The CPU
        times in seconds are `ours_bbox_cpu_seconds`, `pycocotools_bbox_cpu_seconds`, and the same names with "segm".
        `difference` is the largest difference in AP. `images` and `detections` are counts.

    Raises:
        ConfigError: if a package is not installed.
    """
    categories = Categories([Category(3 * i + 1, f"category {i}") for i in range(_NUM_CATEGORIES)], "generated")
    images, annotations, entries = _generate(num_images, categories, seed)
    found: dict[str, Any] = {"images": num_images, "detections": len(entries["bbox"]), "difference": 0.0}
    totals = {"ours": 0.0, "pycocotools": 0.0}
    for kind in _KINDS:
        sides: dict[str, Callable[[str], float]] = {
            "ours": lambda kind: average_precision(images, annotations, categories, entries[kind], kind).values["AP"],
            "pycocotools": lambda kind: _official(images, annotations, categories, entries[kind], kind),
        }
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        values: dict[str, float] = {}
        for _ in range(rounds):
            for side, evaluate in sides.items():
                start = time.process_time()
                values[side] = evaluate(kind)
                seconds[side].append(time.process_time() - start)
        medians = {side: statistics.median(times) for side, times in seconds.items()}
        found |= {f"{side}_{kind}_cpu_seconds": value for side, value in medians.items()}
        found[f"ratio_{kind}"] = medians["pycocotools"] / medians["ours"]
        found["difference"] = max(found["difference"], abs(values["ours"] - values["pycocotools"]))
        totals = {side: total + medians[side] for side, total in totals.items()}
    return found | {"ratio_coco_eval": totals["pycocotools"] / totals["ours"]}


def _official(images: Any, annotations: Any, categories: Categories, entries: Any, kind: str) -> float:
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise ConfigError(
            f"the comparison needs pycocotools ({error}). Install it with `pip install pycocotools`."
        ) from None
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {"images": images, "annotations": annotations, "categories": categories.as_json()}
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes([dict(entry) for entry in entries]), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])


def _generate(
    num_images: int, categories: Categories, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """Generates objects and detections. Objects are ellipses.

    Most detections are shifted copies of objects. The other detections are at random positions.
    """
    rng, masks = np.random.default_rng(seed), import_masks()
    identifiers = [category.identifier for category in categories]
    images = [{"id": number + 1, "height": _HEIGHT, "width": _WIDTH} for number in range(num_images)]
    annotations: list[dict[str, Any]] = []
    entries: dict[str, list[dict[str, Any]]] = {kind: [] for kind in _KINDS}
    for image in images:
        objects = []
        for _ in range(int(rng.integers(1, 2 * _OBJECTS_PER_IMAGE))):
            box, category = _draw_box(rng), int(rng.choice(identifiers))
            encoded = masks.encode(_ellipse(box))
            objects.append((box, category))
            annotations.append(
                {
                    **{"id": len(annotations) + 1, "image_id": image["id"], "category_id": category, "bbox": box},
                    **{"iscrowd": int(rng.random() < 0.02), "area": float(masks.area(encoded))},
                    "segmentation": {"size": [_HEIGHT, _WIDTH], "counts": encoded["counts"].decode()},
                }
            )
        for _ in range(DETECTIONS_PER_IMAGE):
            box, category = objects[int(rng.integers(len(objects)))]
            box = [value + float(rng.normal(0, 6)) for value in box[:2]] + box[2:]
            if rng.random() < 0.4:
                box, category = _draw_box(rng), int(rng.choice(identifiers))
            head = {"image_id": image["id"], "category_id": category, "score": float(rng.random())}
            counts = masks.encode(_ellipse(box))["counts"].decode()
            entries["bbox"].append(head | {"bbox": box})
            entries["segm"].append(head | {"segmentation": {"size": [_HEIGHT, _WIDTH], "counts": counts}})
    return images, annotations, entries


def _draw_box(rng: np.random.Generator) -> list[float]:
    side = float(np.exp(rng.uniform(np.log(12), np.log(300))))
    width, height = side * float(rng.uniform(0.6, 1.5)), side * float(rng.uniform(0.6, 1.5))
    return [float(rng.uniform(0, _WIDTH - 20)), float(rng.uniform(0, _HEIGHT - 20)), width, height]


def _ellipse(box: list[float]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    left, top, width, height = box
    x = (np.arange(_WIDTH) + 0.5 - left - width / 2) / (width / 2)
    y = (np.arange(_HEIGHT) + 0.5 - top - height / 2) / (height / 2)
    return np.asfortranarray((x[None] ** 2 + y[:, None] ** 2 <= 1).astype(np.uint8))
