"""Computes COCO's average precision (Lin et al., 2014, arXiv:1405.0312) with faster-coco-eval."""

# T overlap thresholds, R recalls, K categories, A ranges of size, M limits of detections.

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from beit3_ds.config import ConfigError
from beit3_ds.tasks.detection.categories import Categories

SIZES = ("all", "small", "medium", "large")
"""Ranges of an object's area in pixels: all, below 32 x 32, between 32 x 32 and 96 x 96, above 96 x 96."""

_LIMITS = (1, 10)
_NO_VALUE = -1.0


class ClassScore(NamedTuple):
    """Holds the metrics of one category."""

    name: str
    """Name of the category."""
    objects: int
    """Number of annotated objects of the category, without crowds."""
    values: Mapping[str, float | None]
    """Metrics of the class, by the names in `AveragePrecision.values`. A metric is None if the split has no object that
    counts for it."""


class AveragePrecision(NamedTuple):
    """Holds COCO's metrics, each from 0 to 1."""

    values: dict[str, float]
    """Metrics by name; a metric without objects is left out. `AP` is the mean over IoU thresholds .50 to .95, and `AR`
    is the mean recall with the maximum number of detections. The others are `AP50`, `AP75`, `AP_small`, `AP_medium` and
    `AP_large`."""
    classes: list[ClassScore]
    """Metrics of each category."""


def average_precision(
    images: Sequence[Mapping[str, Any]],
    annotations: Sequence[Mapping[str, Any]],
    categories: Categories,
    entries: Sequence[Mapping[str, Any]],
    kind: str,
    max_detections: int = 100,
) -> AveragePrecision:
    """Computes COCO's metrics of detections.

    Args:
        images: member 'images' of a COCO annotation file; entries need 'id', 'height' and 'width'.
        annotations: member 'annotations' of the file, with ids above 0.
        categories: the categories.
        entries: detections, as entries of a COCO result file.
        kind: "bbox" or "segm".
        max_detections: maximum number of detections per image that count.

    Raises:
        ConfigError: if faster-coco-eval is not installed.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        raise ConfigError(
            f"AP needs faster-coco-eval ({error}). Install it with `pip install '.[detection]'`."
        ) from None
    truth = COCO({"images": list(images), "annotations": list(annotations), "categories": categories.as_json()})
    evaluation = COCOeval_faster(truth, truth.loadRes([dict(entry) for entry in entries]), kind)
    limits = [*(limit for limit in _LIMITS if limit < max_detections), max_detections]
    evaluation.params.maxDets = limits
    evaluation.params.imgIds = sorted(image["id"] for image in images)
    evaluation.params.catIds = [category.identifier for category in categories]
    evaluation.evaluate()
    evaluation.accumulate()
    precision, recall = (np.asarray(evaluation.eval[name]) for name in ("precision", "recall"))
    thresholds = evaluation.params.iouThrs
    values = _values(precision, recall, thresholds)
    counts = _count_objects(annotations)
    classes = [
        ClassScore(
            category.name,
            counts.get(category.identifier, 0),
            _values(precision[:, :, [label]], recall[:, [label]], thresholds),
        )
        for label, category in enumerate(categories)
    ]
    return AveragePrecision({name: value for name, value in values.items() if value is not None}, classes)


def _values(
    precision_TRKAM: NDArray[np.float64], recall_TKAM: NDArray[np.float64], thresholds: NDArray[np.float64]
) -> dict[str, float | None]:
    at = {name: np.isclose(thresholds, overlap) for name, overlap in (("AP50", 0.5), ("AP75", 0.75))}
    found = {"AP": _mean(precision_TRKAM[..., 0, -1])}
    found |= {name: _mean(precision_TRKAM[is_at, ..., 0, -1]) for name, is_at in at.items()}
    found |= {f"AP_{size}": _mean(precision_TRKAM[..., i, -1]) for i, size in enumerate(SIZES) if i}
    return found | {"AR": _mean(recall_TKAM[..., 0, -1])}


def _mean(values: NDArray[np.float64]) -> float | None:
    """Returns the mean of the values that are not -1, COCO's mark for undefined; None if all are undefined."""
    existing = values[values > _NO_VALUE]
    return float(np.mean(existing)) if existing.size else None


def _count_objects(annotations: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    counts: dict[int, int] = {}
    for annotation in annotations:
        if not annotation.get("iscrowd"):
            counts[annotation["category_id"]] = counts.get(annotation["category_id"], 0) + 1
    return counts
