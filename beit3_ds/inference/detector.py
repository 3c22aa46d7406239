"""Detects objects in images, with boxes, masks and categories (paper section 3.2)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, Unpack

import torch
from PIL import Image

from beit3_ds.config.strict import load_section
from beit3_ds.inference.loading import LoadOptions, load_with_head, open_with_head
from beit3_ds.model import TaskModel
from beit3_ds.preprocess import open_image
from beit3_ds.tasks.detection.categories import Categories, Category, stored_categories
from beit3_ds.tasks.detection.config import DetectionConfig
from beit3_ds.tasks.detection.evaluation import detections_to_draw
from beit3_ds.tasks.detection.head import DetectionHead
from beit3_ds.tasks.detection.packing import pack
from beit3_ds.tasks.detection.pictures import draw_objects
from beit3_ds.tasks.detection.records import DetectionRecord, make_record
from beit3_ds.tasks.detection.samples import evaluation_sample

_HEAD = "heads.boxes.stages.0.classes.weight"
_OTHER_KEYS = ("name", "categories")  # keys of the stored description that are no settings


class Detector:
    """Detects objects in images of any size.

    Attributes:
        categories: object categories, in the order of their labels.
    """

    def __init__(self, model: TaskModel, settings: DetectionConfig, categories: Categories) -> None:
        self.categories = categories
        self._model, self._settings = model, settings

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        test_sizes: Sequence[int] | None = None,
        test_flip: bool | None = None,
        **options: Unpack[LoadOptions],
    ) -> Self:
        """Loads a model that was trained for the task `detection`.

        Args:
            path: exported weights, a checkpoint, or a run's output folder.
            test_sizes: sides of squares in pixels. Each image is resized to fit each square, which gives one view per
                square. None uses the sizes of the training run.
            test_flip: whether to detect in flipped images too; None uses the setting of the training run.
            options: device, dtype and sizes (`LoadOptions`).

        Raises:
            ConfigError: if a file cannot be read, if the weights have no head that detects objects, or if
                faster-coco-eval is not installed.
        """
        weights = open_with_head(path, _HEAD, "detects objects")
        task = dict(weights.task or {})
        changes: dict[str, Any] = {"test_sizes": test_sizes, "test_flip": test_flip}
        described = {key: value for key, value in task.items() if key not in _OTHER_KEYS}
        described |= {key: value for key, value in changes.items() if value is not None}
        settings = load_section(DetectionConfig, described, f"{path}: task")
        model = load_with_head(
            weights,
            ("images",),
            lambda config, tensor: DetectionHead(config, settings, settings.num_classes, tensor),
            **options,
        )
        numbered = Categories((Category(i, f"class {i}") for i in range(settings.num_classes)), str(path))
        return cls(model, settings, stored_categories(task, str(path)) or numbered)

    @torch.no_grad()
    def __call__(self, images: Sequence[str | Path | bytes | Image.Image]) -> list[DetectionRecord]:
        """Returns the detections in each image, in descending order of score.

        Raises:
            OSError: if a file cannot be read.
            ValueError: if an image is broken.
        """
        return [self._detect(open_image(image)) for image in images]

    def draw(
        self, image: str | Path | bytes | Image.Image, record: DetectionRecord, least_score: float = 0.3
    ) -> Image.Image:
        """Draws the detections of at least `least_score` over an image; returns a new image."""
        return draw_objects(open_image(image), detections_to_draw(record, self.categories.names, least_score))

    def _detect(self, image: Image.Image) -> DetectionRecord:
        config = self._model.config
        sample = evaluation_sample(image, self._settings, config.image_size, "image", 0)
        batch = pack([sample], None, {}, model=config, num_terms=0, embeds=True)
        (found,) = self._model(batch.to(next(self._model.parameters()).device), None)
        return make_record(found, image.size[::-1])
