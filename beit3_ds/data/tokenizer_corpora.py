"""Training data of the two tokenizers, from the training files of a run."""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from beit3_ds.config import ConfigError, DataConfig, RunConfig
from beit3_ds.data.files.descriptors import OpenFiles
from beit3_ds.data.files.fingerprint import HasFiles
from beit3_ds.data.files.patterns import expand_patterns
from beit3_ds.data.files.records import BrokenRecordError
from beit3_ds.data.images.augmentation import build_augmentation
from beit3_ds.data.order.stream import samples_at
from beit3_ds.data.randomness import sample_rng
from beit3_ds.data.sources import ConcatSources, open_images
from beit3_ds.data.text.paragraphs import BrokenLines, read_paragraphs, whole_file
from beit3_ds.data.workers.pool import Preparation, prepare_in_order
from beit3_ds.data.workers.waiting import WaitLimits

_STREAM = "visual tokenizer"  # key of an order that is independent of pretraining
_BATCHES_AHEAD = 2  # batches that each worker prepares ahead


def read_training_lines(config: DataConfig) -> Iterator[str]:
    """Yields the paragraphs of the texts and then the captions of the pairs; warns about broken ones and skips them.

    Raises:
        ConfigError: if a pattern has no match, a file cannot be read, or more lines of text are broken than
            `max_broken_records`.
    """
    broken = BrokenLines(config.max_broken_records)
    for path in expand_patterns([source.path for source in config.texts.train]):
        yield from (paragraph.text for paragraph in read_paragraphs(whole_file(path), broken))
    for line in broken.lines:
        warnings.warn(f"left out: {line}", stacklevel=2)
    left_out: set[str] = set()
    for source in config.pairs.train:
        images = open_images(source, config.cache_dir)
        for index in range(len(images)):
            try:
                yield images.caption(index)
            except BrokenRecordError as error:
                if (name := images.name(index)) not in left_out:
                    left_out.add(name)
                    warnings.warn(f"left out: {error}", stacklevel=2)
                    broken.add(str(error))


class View(NamedTuple):
    """A view for the tokenizer, and the broken images that were skipped before it."""

    pixels: Tensor
    """Pixels (3, image_size, image_size) float32 in [-1, 1]; for a batch (B, 3, image_size, image_size)."""
    broken_records: dict[str, str]
    """Skipped broken images by name, each with a line that says what is wrong."""


class Views(Protocol):
    """Views for the tokenizer, by position in an endless order."""

    def __len__(self) -> int:
        """Returns the number of images in one epoch; positions continue beyond it."""

    def read(self, position: int) -> View:
        """Reads the view at a position."""


class TokenizerImages:
    """Views of all training images for the tokenizer, including the images of pairs.

    Items are numbered by position in an endless order: step s takes the k images at [s*k, (s+1)*k), with any number of
    ranks. Every epoch has each image once, in a new order and with a new crop. Crops, flips and colors are drawn as in
    pretraining, so the tokenizer is trained on the kind of views that it will encode.
    """

    def __init__(self, config: RunConfig) -> None:
        """Opens the training files of images and pairs.

        Raises:
            ConfigError: if there are none, or files cannot be read.
        """
        # A source that both streams read counts once. Weights apply to pretraining only.
        sources = (*config.data.images.train, *config.data.pairs.train)
        unweighted = dict.fromkeys(dataclasses.replace(source, weight=None) for source in sources)
        if not unweighted:
            raise ConfigError("data: the visual tokenizer needs sources in images.train or pairs.train.")
        files = OpenFiles(config.data.max_open_files)
        self._images = ConcatSources([open_images(source, config.data.cache_dir, files) for source in unweighted])
        self._paths = [f"data source {number} ({source.path})" for number, source in enumerate(unweighted)]
        self._seed = config.training.seed
        self._augmentation = build_augmentation(config, config.data.flip_probability)

    def __len__(self) -> int:
        """Returns the number of images in one epoch; positions continue beyond it."""
        return len(self._images)

    def sources(self) -> dict[str, HasFiles]:
        """Returns the images of each source, by its number and its path in the config."""
        return dict(zip(self._paths, self._images, strict=True))

    def __getitem__(self, position: int) -> Tensor:
        """Returns the pixels of the view at a position."""
        return self.read(position).pixels

    def read(self, position: int) -> View:
        """Reads the view at a position; a broken image is replaced by the next one.

        Raises:
            ConfigError: if no image can be read.
        """
        count = len(self._images)
        epochs, samples = samples_at(self._seed, (_STREAM,), np.array([position]), count)
        epoch, sample = int(epochs[0]), int(samples[0])
        broken: dict[str, str] = {}
        for index in range(sample, sample + count):
            source, number = self._images.locate(index % count)
            try:
                image = source.image(number, self._augmentation.min_side)
            except BrokenRecordError as error:
                broken[source.name(number)] = str(error)
            else:
                rng = sample_rng(self._seed, "tokenizer view", epoch, sample)
                return View(self._augmentation(image, rng)[1], broken)
        raise ConfigError(f"data: none of the {count} training images can be read.")


def _join_views(views: Sequence[View]) -> View:
    broken: dict[str, str] = {}
    for view in views:
        broken |= view.broken_records
    return View(torch.stack([view.pixels for view in views]), broken)


def build_view_loader(images: Views, batches: Iterable[range], num_workers: int, limits: WaitLimits) -> Iterator[View]:
    """Yields one `View` per batch, with the views at its positions in order.

    Workers import the main module of the program again, so it must start under `if __name__ == "__main__"`.

    Args:
        images: views by position.
        batches: positions of each batch; iterated once.
        num_workers: number of processes that read ahead; 0 reads in this process.
        limits: limits of the wait for a batch.

    Raises:
        DataTimeoutError, WorkerLossError: as `prepare_in_order` does.
    """
    preparation = Preparation(work=_ViewWork(images), describe=_name_views, limits=limits)
    return prepare_in_order(preparation, batches, num_workers, _BATCHES_AHEAD)


class _ViewWork:
    """Prepares a batch of views; picklable, so that a worker can call it."""

    def __init__(self, images: Views) -> None:
        self._images = images

    def __call__(self, positions: range, note: Callable[[str], None]) -> View:
        note(f"{_name_views(positions)} of the visual tokenizer")
        return _join_views([self._images.read(position) for position in positions])


def _name_views(positions: range) -> str:
    return f"views {positions.start} to {positions.stop - 1}"
