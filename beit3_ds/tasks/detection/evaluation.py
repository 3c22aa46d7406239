"""Detects the objects in all images of a split, computes metrics, and writes result files and a page."""

import csv
import functools
import io
import json
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from beit3_ds.atomic_file import atomic_write
from beit3_ds.config.data import Split
from beit3_ds.data import EvaluationBatches
from beit3_ds.retrying.folder import ResultFolder
from beit3_ds.tasks.detection.categories import Categories
from beit3_ds.tasks.detection.config import DetectionConfig
from beit3_ds.tasks.detection.detections import Detections
from beit3_ds.tasks.detection.files import AnnotatedObjects
from beit3_ds.tasks.detection.pictures import DrawnObject, draw_objects
from beit3_ds.tasks.detection.records import DetectionRecord, decode_mask, make_record, whole_mask
from beit3_ds.tasks.detection.samples import DetectionSample, ObjectSamples
from beit3_ds.tasks.detection.score import AveragePrecision, average_precision
from beit3_ds.tasks.detection.segmentations import whole_segmentation
from beit3_ds.tasks.detection.views import INDICES, ORIGINAL_SIZES, SAMPLES
from beit3_ds.tasks.rank_task import Evaluator
from beit3_ds.tasks.result_page import ShownSample, choose_shown, write_result_page
from beit3_ds.tasks.results import GatheredResults, SampleResults

FILES = {"bbox": "boxes.json", "segm": "masks.json"}
"""Maps each kind of result, "bbox" or "segm", to the name of the result file in COCO's format."""
CLASSES, PAGE = "classes.csv", "detections.html"
"""Names of the table of metrics per category, and of the result page."""

_PREFIXES = {"bbox": "box", "segm": "mask"}


def detect_split(evaluator: Evaluator, split: Split) -> GatheredResults | None:
    """Detects the objects in every image of a split; all ranks must call this function.

    Returns:
        On the main rank, a `DetectionRecord` per image as JSON, under the name `detections`; None on other ranks.
    """
    results = SampleResults()
    for batch, found in evaluator.predict(evaluator.batches(split)):
        if found is None or evaluator.mesh.tensor.rank:
            continue
        targets = batch.host_targets
        sizes = dict(zip(targets[SAMPLES].tolist(), targets[ORIGINAL_SIZES].tolist(), strict=True))
        records = [_record(detections, sizes[sample]) for sample, detections in enumerate(found)]
        results.add(targets[INDICES], detections=[record.to_json() for record in records])
    return results.gather(evaluator.mesh)


def _record(detections: Detections, size: Sequence[int]) -> DetectionRecord:
    return make_record(detections, (size[0], size[1]))


class DetectedSplit:
    """Combines the images of a split with their detections, on the main rank.

    The argument `place` of the methods is the index of an image among the evaluated images, from 0.
    """

    def __init__(self, batches: EvaluationBatches, results: GatheredResults, settings: DetectionConfig) -> None:
        """Stores the gathered detections, and the sources of the split's images.

        Args:
            batches: samples of the split.
            results: gathered detections, the result of `detect_split`.
            settings: the task's settings.
        """
        self._sources = batches.streams["images"].sources
        self._indices, self._settings = results.indices.tolist(), settings
        self.records = list(map(DetectionRecord.from_json, results.strings("detections")))

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self._indices)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Returns the kinds of results: "bbox", and also "segm" if the task predicts masks."""
        return ("bbox", "segm") if self._settings.masks else ("bbox",)

    @property
    def shown_score(self) -> float:
        """Returns the minimum score of detections shown on the page."""
        return self._settings.shown_score

    @property
    def opened(self) -> list[AnnotatedObjects]:
        """Returns the annotated sources of the split."""
        return [samples.source for samples in self._sources if isinstance(samples, ObjectSamples)]

    @property
    def categories(self) -> Categories:
        """Returns the categories of the split's annotation files."""
        return self.opened[0].categories

    def locate(self, place: int) -> tuple[AnnotatedObjects, int]:
        """Returns the source of an image, and the index of the image in this source."""
        samples, index = self._sources.locate(self._indices[place])
        assert isinstance(samples, ObjectSamples)
        return samples.source, index

    def identifier(self, place: int) -> int:
        """Returns the id that the annotation file gives to an image."""
        source, index = self.locate(place)
        return int(source.identifiers[index])

    def entries(self, kind: str) -> list[dict[str, Any]]:
        """Returns the detections of all images as entries of a COCO result file.

        Args:
            kind: "bbox" or "segm".
        """
        category_ids = [category.identifier for category in self.categories]
        return [
            entry
            for place, record in enumerate(self.records)
            for entry in record.entries(self.identifier(place), category_ids, kind)
        ]

    def scores(self) -> dict[str, AveragePrecision]:
        """Returns COCO's metrics for each kind of result ("bbox" or "segm"). Empty if there are no images, or if any
        source has no annotations.
        """
        if not len(self) or not all(source.has_annotations for source in self.opened):
            return {}
        images, annotations = read_truth(self.opened, {self.identifier(place) for place in range(len(self))})
        limit = max(100, self._settings.max_detections)
        return {
            kind: average_precision(images, annotations, self.categories, self.entries(kind), kind, limit)
            for kind in self.kinds
        }


def read_truth(
    sources: Sequence[AnnotatedObjects], wanted: Set[int]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Reads the image entries and the annotation entries of COCO annotation files.

    Gives the annotations new ids, and adds missing 'iscrowd' and 'area' values to them.

    Args:
        sources: sources with annotations.
        wanted: ids of the images whose entries and annotations are returned.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for source in sources:
        of_images, of_objects = source.ground_truth()
        images += [image for image in of_images if image["id"] in wanted]
        annotations += [annotation for annotation in of_objects if annotation["image_id"] in wanted]
    # COCO's code treats an object with id 0 as unmatched.
    return images, [_complete(annotation) | {"id": i} for i, annotation in enumerate(annotations, 1)]


def _complete(annotation: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of an annotation with 'iscrowd' and 'area', because COCO's evaluation needs them.

    Existing values are kept. A missing 'iscrowd' becomes 0, and a missing 'area' becomes the area of the box.
    """
    return {"iscrowd": 0, "area": annotation["bbox"][2] * annotation["bbox"][3], **annotation}


def collect_metrics(scores: Mapping[str, AveragePrecision]) -> dict[str, float]:
    """Returns the metrics of boxes and of masks by name, such as `box_AP50` and `mask_AP`.

    Args:
        scores: average precisions by kind of result, "bbox" or "segm".
    """
    return {
        f"{_PREFIXES[kind]}_{name}": value for kind, found in scores.items() for name, value in found.values.items()
    }


def write_files(split: DetectedSplit, scores: Mapping[str, AveragePrecision], folder: ResultFolder) -> None:
    """Writes the detections in COCO's format and, for a split with annotations, a table of metrics per category."""
    for kind in split.kinds:
        folder.write(FILES[kind], functools.partial(_write_entries, split=split, kind=kind))
    if scores:
        folder.write(CLASSES, lambda path: write_classes(path, scores))


def write_page(path: Path, split: DetectedSplit, scores: Mapping[str, AveragePrecision], page_samples: int) -> None:
    """Writes a page that shows images with their annotated objects beside the detections.

    Args:
        path: .html file to write.
        split: the images and their detections.
        scores: metrics by kind of result; empty without annotations.
        page_samples: number of images to show.
    """
    places = choose_shown([None] * len(split), page_samples)
    metrics, least = collect_metrics(scores), split.shown_score
    metrics |= {
        f"{_PREFIXES[kind]}_AP of {found.name}": found.values["AP"]
        for kind, of_kind in scores.items()
        for found in of_kind.classes
        if found.values["AP"] is not None
    }
    note = f"{len(places)} of {len(split)} images: annotations at the left, detections above {least:g} right."
    write_result_page(path, "Detected objects", metrics, (_show(split, place) for place in places), note)


def _show(split: DetectedSplit, place: int) -> ShownSample:
    source, index = split.locate(place)
    image, record = source.image(index), split.records[place]
    truth = [
        DrawnObject(
            [*found.box[:2].tolist(), *(found.box[2:] - found.box[:2]).tolist()],
            found.label,
            split.categories.names[found.label],
            None if found.segmentation is None else whole_segmentation(found.segmentation, source.size(index)),
        )
        for found in source.objects(index)
    ]
    drawn = detections_to_draw(record, split.categories.names, split.shown_score)
    pictures = [draw_objects(image, drawn)]
    if source.has_annotations:
        pictures.insert(0, draw_objects(image, truth))
    return ShownSample(
        images=pictures,
        title=source.name(index),
        lines={"annotated": str(len(truth)), "detected": str(len(drawn))},
    )


def draw_training_sample(sample: DetectionSample, names: Sequence[str]) -> ShownSample:
    """Draws a training image with the boxes and masks of its objects, as the loss sees them.

    Args:
        sample: a training sample.
        names: category names by label.
    """
    assert sample.objects is not None, "the sample is one of an evaluation"
    pixels, objects = sample.pixels[0], sample.objects
    height, width = pixels.shape[1:]
    values = ((pixels + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
    masks: Sequence[Any] = [None] * len(objects.labels)
    if len(objects.masks):
        masks = [
            whole_mask(mask.float(), box, (height, width)).numpy()
            for mask, box in zip(objects.masks, objects.boxes, strict=True)
        ]
    drawn = [
        DrawnObject([*box[:2].tolist(), *(box[2:] - box[:2]).tolist()], label, names[label], mask)
        for box, label, mask in zip(objects.boxes, objects.labels.tolist(), masks, strict=True)
    ]
    image = Image.fromarray(values.permute(1, 2, 0).numpy())
    return ShownSample(
        images=[draw_objects(image, drawn)],
        title=sample.name,
        lines={"pixels": f"{width} x {height}", "objects": str(len(drawn))},
    )


def detections_to_draw(record: DetectionRecord, names: Sequence[str], least_score: float) -> list[DrawnObject]:
    """Returns an image's detections with scores of at least `least_score`, as objects to draw."""
    masks: list[Any] = [None] * len(record)
    if record.counts is not None:
        masks = [decode_mask(counts, record.size) for counts in record.counts]
    return [
        DrawnObject(box, label, f"{names[label]} {score:.0%}", mask)
        for box, label, score, mask in zip(record.boxes, record.labels, record.scores, masks, strict=True)
        if score >= least_score
    ]


def _write_entries(path: Path, split: DetectedSplit, kind: str) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(split.entries(kind)).encode())


def write_classes(path: Path, scores: Mapping[str, AveragePrecision]) -> None:
    """Writes one line per category with the number of objects and all metrics; undefined metrics are empty."""
    kinds = list(scores)
    names = list(scores[kinds[0]].classes[0].values)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["category", "objects", *(f"{_PREFIXES[kind]}_{name}" for kind in kinds for name in names)])
    for of_category in zip(*(scores[kind].classes for kind in kinds), strict=True):
        values = [found.values[name] for found in of_category for name in names]
        writer.writerow(
            [of_category[0].name, of_category[0].objects, *("" if v is None else f"{v:.6f}" for v in values)]
        )
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())
