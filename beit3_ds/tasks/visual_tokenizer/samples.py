"""Opens the training and validation images of the visual tokenizer, with one view per image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from beit3_ds.config import RunConfig, SourceConfig
from beit3_ds.data.files.descriptors import OpenFiles
from beit3_ds.data.images.augmentation import CenterViews, ViewTransform, build_augmentation
from beit3_ds.data.samples import ImageSourceSamples, SampleKey, Split, Stream
from beit3_ds.data.sources import ConcatSources, check_no_sample_twice, open_images


class TokenizerView(NamedTuple):
    """Holds one augmented or resized image for the visual tokenizer."""

    name: str
    """File of the sample and the sample's name in the file, for messages."""
    pixels: Tensor
    """Cropped image, (3, image_size, image_size) uint8."""
    colors: Tensor | None
    """Parameters of three colour changes to apply to the image (`pixels.change_colors`), (3, 3) float32; None for no
    change."""


@dataclass(frozen=True, kw_only=True)
class TokenizerViews(ImageSourceSamples):
    """Prepares images for the visual tokenizer.

    For training images, the transform in the field `views` is the augmentation of pretraining. For validation images,
    it is a center crop.
    """

    def prepare(self, index: int, key: SampleKey) -> TokenizerView:
        """Reads and augments sample `index` of the source; `key` seeds the augmentation.

        Raises:
            BrokenRecordError: if the image cannot be read.
        """
        views = self.views(self.read(index), key.rng("augmentation"))
        return TokenizerView(self.name(index), views.tokenizer, views.colors)


def build_streams(config: RunConfig, split: Split) -> dict[str, Stream]:
    """Opens the images of a split; training images are augmented, validation images are cropped at the center.

    Raises:
        ConfigError: if a file is missing or cannot be read.
    """
    images, size = config.data.images, config.tokenizers.visual.image_size
    if split == "train":
        return {"images": open_views(config, images.train, build_augmentation(config, config.data.flip_probability))}
    views = CenterViews(image_size=size, tokenizer_image_size=size)
    return {"images": open_views(config, images.validation, views)} if images.validation else {}


def open_views(config: RunConfig, sources: Sequence[SourceConfig], views: ViewTransform) -> Stream:
    """Opens several sources of images as one sequence of samples; captions of image-text pairs are ignored.

    Raises:
        ConfigError: if a file is missing or cannot be read.
    """
    check_no_sample_twice(sources)
    files, cache_dir = OpenFiles(config.data.max_open_files), config.data.cache_dir
    opened = [TokenizerViews(source=open_images(source, cache_dir, files), views=views) for source in sources]
    return Stream(ConcatSources(opened))
