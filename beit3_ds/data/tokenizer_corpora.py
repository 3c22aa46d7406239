"""What the two tokenizers learn from: the training files of a run."""

import dataclasses
import warnings
from collections.abc import Iterator

from torch import Tensor
from torch.utils.data import Dataset

from beit3_ds.config import ConfigError, DataConfig, RunConfig
from beit3_ds.data.augmentation import build_augmentation
from beit3_ds.data.files import expand_patterns
from beit3_ds.data.randomness import sample_rng
from beit3_ds.data.shards import BrokenRecord
from beit3_ds.data.sources import Parts, open_images
from beit3_ds.data.text_files import BrokenLines, read_paragraphs, whole_file


def read_training_lines(config: DataConfig) -> Iterator[str]:
    """Yields the paragraphs of the texts, then the captions of the pairs; broken ones are left out with a warning.

    Raises:
        ConfigError: for a pattern without a match, a file that cannot be read, or more broken lines of text than
            `max_broken_records`.
    """
    broken = BrokenLines(config.max_broken_records)
    for path in expand_patterns([source.path for source in config.texts.train]):
        yield from read_paragraphs(whole_file(path), broken)
    for line in broken.lines:
        warnings.warn(f"left out: {line}", stacklevel=2)
    for source in config.pairs.train:
        images = open_images(source, config.prepared_dir)
        for index in range(len(images)):
            try:
                yield images.caption(index)
            except BrokenRecord as error:
                warnings.warn(f"left out: {error}", stacklevel=2)


class TokenizerImages(Dataset[Tensor]):
    """Map-style dataset of the tokenizer's views of all training images, those of pairs included.

    It has one item for every view that the training draws: item i is a view of image i % n with a crop of its own, so
    that the images come again but the crops do not. Crops, flips and colors are those of the pretraining, so the
    tokenizer learns on what it will encode.
    """

    def __init__(self, config: RunConfig) -> None:
        """Opens the training files of images and pairs.

        Raises:
            ConfigError: if there are none, or for files that cannot be read.
        """
        # Both streams may read the same source: it counts once. Weights are the pretraining's.
        sources = (*config.data.images.train, *config.data.pairs.train)
        unweighted = dict.fromkeys(dataclasses.replace(source, weight=None) for source in sources)
        if not unweighted:
            raise ConfigError("data: the visual tokenizer needs sources in images.train or pairs.train.")
        self._images = Parts([open_images(source, config.data.prepared_dir) for source in unweighted])
        self._seed = config.training.seed
        self._augmentation = build_augmentation(config, config.data.flip_probability)
        self._num_views = config.tokenizers.visual.training_steps * config.tokenizers.visual.batch_size

    def __len__(self) -> int:
        """Views that the training draws."""
        return self._num_views

    def __getitem__(self, item: int) -> Tensor:
        """Returns one view, (3, image_size, image_size) float32 in [-1, 1].

        In the place of a broken image, the next one is shown, with a warning.

        Raises:
            IndexError: for an item outside [0, len).
            ConfigError: if no image can be read.
        """
        if not 0 <= item < self._num_views:
            raise IndexError(f"view {item} of {self._num_views}")
        for index in range(item, item + len(self._images)):
            try:
                source, number = self._images.locate(index % len(self._images))
                image = source.image(number)
            except BrokenRecord as error:
                warnings.warn(f"left out: {error}", stacklevel=2)
            else:
                return self._augmentation(image, sample_rng(self._seed, "tokenizer view", item))[1]
        raise ConfigError(f"data: none of the {len(self._images)} training images can be read.")
