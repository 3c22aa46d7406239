"""Prepares images with label maps: augmented crops for training, whole images for an evaluation."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from beit3_ds.config import RunConfig
from beit3_ds.data.files.fingerprint import SourceFile
from beit3_ds.data.files.records import Skipped
from beit3_ds.data.samples import SampleKey, Split, Stream
from beit3_ds.data.sources import ConcatSources, check_no_sample_twice
from beit3_ds.tasks.segmentation.augmentation import CropAugmentation
from beit3_ds.tasks.segmentation.config import SegmentationConfig
from beit3_ds.tasks.segmentation.files import LabelMaps, open_label_maps

_LARGEST_SEED = 2**63


class LabelledCrop(NamedTuple):
    """Holds an augmented training crop and its labels."""

    name: str
    """Path of the image file, for messages."""
    view: Tensor
    """Pixels of the crop, (3, size, size) float32 in [-1, 1]."""
    labels: NDArray[np.uint8]
    """Class of each pixel, (size, size) uint8; 255 where unknown."""
    seed: int
    """Seed of the random points at which the loss compares masks."""
    drop_path: NDArray[np.float32]
    """Stochastic-depth factors for the FFNs in the adapter's extractors, (extractors,)."""


class WholeImage(NamedTuple):
    """Holds a whole image at its original size, for an evaluation."""

    name: str
    """Path of the image file, for messages."""
    sample_index: int
    """Index of the image in its split."""
    pixels: Tensor
    """Pixels, (3, height, width) uint8."""
    labels: Tensor
    """Class of each pixel, (height, width) uint8; 255 where unknown."""


@dataclass(frozen=True, kw_only=True)
class SegmentationSamples:
    """Prepares the images and label maps of one source."""

    is_last_open: ClassVar[bool] = False

    source: LabelMaps
    """Images and label maps of the source."""
    augmentation: CropAugmentation | None
    """Draws training crops; None prepares whole images."""
    num_extractors: int
    """Number of extractors of the adapter; 0 without an adapter."""
    drop_path_rate: float
    """Probability that stochastic depth drops the FFN of an extractor for an image."""

    def __len__(self) -> int:
        """Returns the number of images, including broken images."""
        return len(self.source)

    def files(self) -> Iterable[SourceFile]:
        """Returns the name, size in bytes and number of samples of each image file."""
        return self.source.files()

    def image_files(self) -> Iterable[str]:
        """Returns the paths of all images."""
        return self.source.image_files()

    def identity(self, index: int) -> bytes:
        """Returns the image's path relative to the source's image folder, without extension, as bytes.

        A resumed run recognises images by these bytes.
        """
        return self.source.stem(index).encode("utf-8", "surrogatepass")

    def name(self, index: int) -> str:
        """Returns the path of an image, for messages."""
        return self.source.name(index)

    def skipped(self) -> dict[str, Skipped]:
        """Returns the number of skipped files for each reason, with an example."""
        return self.source.skipped

    def prepare(self, index: int, key: SampleKey) -> LabelledCrop | WholeImage:
        """Reads image `index` and its label map. In the training split, both are augmented.

        `key` seeds the augmentation, stochastic depth and the random points of the loss.

        Raises:
            BrokenRecordError: if the image or the label map cannot be read, or their sizes differ.
        """
        image, labels = self.source.read(index)
        if self.augmentation is None:
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
            return WholeImage(self.name(index), key.index, pixels, torch.from_numpy(labels))
        view, own = self.augmentation(image, labels, key.rng("crop"))
        return LabelledCrop(
            name=self.name(index),
            view=view,
            labels=own,
            seed=int(key.rng("points").integers(_LARGEST_SEED)),
            drop_path=_draw_factors(key.rng("extractors"), self.num_extractors, self.drop_path_rate),
        )


def build_streams(
    config: RunConfig, settings: SegmentationConfig, num_extractors: int, split: Split
) -> dict[str, Stream]:
    """Opens the images of a split.

    Args:
        config: the run's configuration.
        settings: the task's settings.
        num_extractors: number of extractors of the adapter.
        split: name of the split; images of "test" need no label maps.

    Returns:
        The samples, under the key "images"; empty if the split has no sources.

    Raises:
        ConfigError: if a folder cannot be read, if label maps are missing, or if an image or label map has a wrong
            size.
    """
    augmentation = build_augmentation(config, settings) if split == "train" else None
    samples = [
        SegmentationSamples(
            source=source,
            augmentation=augmentation,
            num_extractors=num_extractors,
            drop_path_rate=config.model.drop_path_rate,
        )
        for source in open_split(config, settings, split)
    ]
    return {"images": Stream(ConcatSources(samples))} if samples else {}


def open_split(config: RunConfig, settings: SegmentationConfig, split: Split) -> list[LabelMaps]:
    """Opens the sources of a split; images of "test" need no label maps.

    Raises:
        ConfigError: if two sources share samples, if a source has the wrong keys for its format, if a folder cannot be
            read, if label maps are missing, or if an image or label map has a wrong size.
    """
    sources = getattr(config.data.images, split)
    check_no_sample_twice(sources)
    return [open_label_maps(source, settings.num_classes, is_complete=split != "test") for source in sources]


def build_augmentation(config: RunConfig, settings: SegmentationConfig) -> CropAugmentation:
    """Builds the training augmentation from the configuration."""
    return CropAugmentation(
        size=config.model.image_size,
        min_scale=settings.min_scale,
        max_scale=settings.max_scale,
        max_class_share=settings.max_class_share,
        flip_probability=config.data.flip_probability,
        distorts=settings.distortion,
    )


def _draw_factors(rng: np.random.Generator, count: int, rate: float) -> NDArray[np.float32]:
    """Draws a stochastic-depth factor per branch: 0 with probability `rate`, otherwise 1 / (1 - rate)."""
    keeps = rng.random(count) >= rate
    return (keeps / (1 - rate)).astype(np.float32)
