"""Segments images: assigns a class to each pixel (paper section 3.2)."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from beit3_ds.config import ModelConfig
from beit3_ds.config.strict import load_section
from beit3_ds.inference.loading import LoadOptions, open_with_head
from beit3_ds.preprocess import open_image
from beit3_ds.tasks.segmentation.config import SegmentationConfig
from beit3_ds.tasks.segmentation.head import SegmentationHead
from beit3_ds.tasks.segmentation.model import SegmentationModel
from beit3_ds.tasks.segmentation.packing import pack_windows
from beit3_ds.tasks.segmentation.pictures import draw_labels
from beit3_ds.tasks.segmentation.sliding import SlidingWindows

_HEAD = "heads.decoder.classes.weight"
_OTHER_KEYS = ("name", "names", "class_names")  # keys of the stored description that are no sizes


class Segmenter:
    """Segments images of any size, window by window.

    Attributes:
        names: name of each class.
    """

    def __init__(self, model: SegmentationModel, settings: SegmentationConfig, names: Sequence[str]) -> None:
        self.names = list(names)
        self._model, self._windows = model, SlidingWindows(settings, model.config.image_size)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        scales: Sequence[float] | None = None,
        flips: bool | None = None,
        **options: Unpack[LoadOptions],
    ) -> Self:
        """Loads a model that was trained for the task `segmentation`.

        Args:
            path: exported weights, a checkpoint, or a run's output folder.
            scales: relative sizes at which images are segmented, such as (0.75, 1.0); scores are averaged over the
                sizes. None uses the scales of the training run.
            flips: whether to average with the flipped image; None uses the setting of the training run.
            options: `device`, `dtype` and `image_size` (`LoadOptions`).

        Raises:
            ConfigError: if a file cannot be read, if the weights have no head that segments images, or if transformers
                is not installed.
        """
        weights = open_with_head(path, _HEAD, "segments images")
        task = dict(weights.task or {})
        changes: dict[str, Any] = {"scales": scales, "flips": flips}
        described = {key: value for key, value in task.items() if key not in _OTHER_KEYS}
        described |= {key: value for key, value in changes.items() if value is not None}
        settings = load_section(SegmentationConfig, described, f"{path}: task")

        def build(config: ModelConfig) -> SegmentationModel:
            return SegmentationModel(lambda model, tensor: SegmentationHead(model, tensor, settings), config)

        sizes = {"image_size": options.get("image_size")}
        device, dtype = options.get("device", "cpu"), options.get("dtype", torch.float32)
        model = SegmentationModel.from_weights(weights, build, sizes, device=device, dtype=dtype)
        names = task.get("names") or [f"class {index}" for index in range(settings.num_classes)]
        return cls(model.requires_grad_(False), settings, names)

    def __call__(self, images: Sequence[str | Path | bytes | Image.Image]) -> list[NDArray[np.uint8]]:
        """Returns the class index of every pixel, one array of (height, width) uint8 per image.

        Raises:
            OSError: if a file cannot be read.
            ValueError: if an image is broken.
        """
        return [self._segment(open_image(image)) for image in images]

    def draw(self, image: str | Path | bytes | Image.Image, labels: NDArray[np.uint8]) -> Image.Image:
        """Draws the classes in colours over an image, with a legend on the right.

        Args:
            image: the image.
            labels: class index of every pixel, (height, width) uint8.
        """
        return draw_labels(open_image(image), labels, self.names)

    def _segment(self, image: Image.Image) -> NDArray[np.uint8]:
        (labels,) = self._windows.predict([image], self._score)
        found: NDArray[np.uint8] = labels.numpy()
        return found

    @torch.no_grad()
    def _score(self, batches: Iterable[Sequence[Tensor]]) -> Iterator[Tensor]:
        device = next(self._model.parameters()).device
        for views in batches:
            yield self._model(pack_windows(views, self._model.config.patch_size).to(device), None)
