"""Segments all images of a split, and counts the pixels of each pair of true and predicted class over all ranks."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from beit3_ds.data import EvaluationBatches
from beit3_ds.data.samples import Split
from beit3_ds.tasks.rank_task import Evaluator
from beit3_ds.tasks.result_page import choose_shown
from beit3_ds.tasks.segmentation.config import SegmentationConfig
from beit3_ds.tasks.segmentation.confusion import Confusion
from beit3_ds.tasks.segmentation.packing import pack_windows, unpack_whole
from beit3_ds.tasks.segmentation.pictures import encode_label_map
from beit3_ds.tasks.segmentation.samples import WholeImage
from beit3_ds.tasks.segmentation.sliding import SlidingWindows


class ShownImage(NamedTuple):
    """Holds the pixels, true classes and predicted classes of an image that a result page shows."""

    sample_index: int
    """Index of the image in its split."""
    pixels: Tensor
    """Pixels, (3, height, width) uint8."""
    truth: Tensor
    """Class of each pixel, (height, width) uint8; 255 where unknown."""
    predicted: Tensor
    """Predicted class of each pixel, (height, width) uint8."""


@dataclass
class SegmentedImages:
    """Collects the evaluation results of segmented images, of one rank or of all ranks."""

    confusion: Confusion
    """Confusion matrix over the pixels of all images."""
    num_images: int = 0
    """Number of images."""
    shown: list[ShownImage] = field(default_factory=list)
    """Images for the result page."""
    label_maps: list[tuple[int, Tensor]] = field(default_factory=list)
    """Index of each image in its split, and its predicted label map as PNG bytes (uint8). Empty if the evaluation
    writes no label maps."""

    def add(self, image: WholeImage, predicted: Tensor) -> None:
        """Adds the pixels of an image to the confusion matrix.

        Args:
            image: the image with its true classes.
            predicted: predicted class of each pixel, (height, width) uint8.
        """
        self.num_images += 1
        self.confusion += Confusion.of(image.labels, predicted, len(self.confusion.counts_CC))


def segment_split(
    evaluator: Evaluator,
    split: Split,
    windows: SlidingWindows,
    patch_size: int,
    evaluation: Mapping[Split, EvaluationBatches],
    *,
    with_files: bool,
) -> SegmentedImages | None:
    """Segments all images of a split; all ranks must call this function.

    Each data-parallel rank segments different images. Pixel counts are integers, so the sums over all ranks are exact.
    Each rank sends its results once to the main rank, over gloo.

    Args:
        evaluator: gives access to the model and the ranks.
        split: name of the split.
        windows: cuts images into windows and merges the windows' scores.
        patch_size: side of a patch in pixels.
        evaluation: images of each split; empty on ranks that read no images.
        with_files: whether to keep label maps and images for result files.

    Returns:
        Results over all images on the main rank; None on other ranks.
    """
    settings, mesh = windows.settings, evaluator.mesh
    own = SegmentedImages(Confusion.empty(settings.num_classes))
    shown = _shown_indices(evaluation.get(split), settings) if with_files else set()
    for batch in evaluator.batches(split):
        images = unpack_whole(batch)
        for image, predicted in zip(images, _predict(evaluator, images, windows, patch_size), strict=True):
            if mesh.tensor.rank:  # the first rank counts the same predictions
                continue
            own.add(image, predicted)
            if image.sample_index in shown:
                own.shown.append(ShownImage(image.sample_index, image.pixels, image.labels, predicted))
            if with_files and settings.writes_predictions:
                own.label_maps.append((image.sample_index, encode_label_map(predicted)))
    shown_images = [tuple(image) for image in own.shown]
    collected = mesh.host.collect([own.confusion.counts_CC, own.num_images, shown_images, own.label_maps])
    return None if collected is None else _join(collected)


def _shown_indices(batches: EvaluationBatches | None, settings: SegmentationConfig) -> set[int]:
    count = 0 if batches is None else batches.num_samples["images"]
    return set(choose_shown([None] * count, min(count, settings.page_samples)))


def _predict(
    evaluator: Evaluator, images: Sequence[WholeImage], windows: SlidingWindows, patch_size: int
) -> list[Tensor]:
    """Returns the class of each pixel of each image, (height, width) uint8.

    All ranks run the same number of batches of windows; some of the batches may be empty.
    """
    own = len(windows.plan([(image.labels.shape[0], image.labels.shape[1]) for image in images]))
    most = max(evaluator.mesh.data_host.gather(own))

    def score(batches: Iterable[Sequence[Tensor]]) -> Iterator[Tensor]:
        for _, scores in evaluator.predict(pack_windows(views, patch_size) for views in batches):
            yield scores

    return windows.predict([picture(image.pixels) for image in images], score, most)


def picture(pixels: Tensor) -> Image.Image:
    """Converts pixels, (3, height, width) uint8, to an RGB image."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _join(collected: Sequence[Any]) -> SegmentedImages:
    counts, num_images, shown, label_maps = zip(*collected, strict=True)
    return SegmentedImages(
        Confusion(torch.stack(counts).sum(0)),
        sum(num_images),
        sorted((ShownImage(*image) for of_rank in shown for image in of_rank), key=lambda image: image.sample_index),
        [label_map for of_rank in label_maps for label_map in of_rank],
    )
