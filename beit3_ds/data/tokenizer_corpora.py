"""What the two tokenizers learn from: the training files of a run."""

import dataclasses
import multiprocessing
import warnings
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from beit3_ds.config import ConfigError, DataConfig, RunConfig
from beit3_ds.data.augmentation import build_augmentation
from beit3_ds.data.files import expand_patterns
from beit3_ds.data.fingerprint import HasFiles
from beit3_ds.data.open_files import OpenFiles
from beit3_ds.data.order import samples_at
from beit3_ds.data.randomness import sample_rng
from beit3_ds.data.shards import BrokenRecord
from beit3_ds.data.sources import Parts, open_images
from beit3_ds.data.text_files import BrokenLines, read_paragraphs, whole_file

_STREAM = "visual tokenizer"  # its own order, whatever the streams of the pretraining


def read_training_lines(config: DataConfig) -> Iterator[str]:
    """Yields the paragraphs of the texts, then the captions of the pairs; broken ones are left out with a warning.

    Raises:
        ConfigError: for a pattern without a match, a file that cannot be read, or more broken lines of text than
            `max_broken_records`.
    """
    broken = BrokenLines(config.max_broken_records)
    for path in expand_patterns([source.path for source in config.texts.train]):
        yield from (paragraph.text for paragraph in read_paragraphs(whole_file(path), broken))
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

    Its items are the positions of the training's endless order: the k images of step s stand at [s*k, (s+1)*k),
    whatever the number of ranks. Every epoch holds each image once, in an order of its own and with a crop of its own.
    Crops, flips and colors are those of the pretraining, so the tokenizer learns on what it will encode.
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
        files = OpenFiles(config.data.max_open_files)
        self._images = Parts([open_images(source, config.data.prepared_dir, files) for source in unweighted])
        self._paths = [f"data source {number} ({source.path})" for number, source in enumerate(unweighted)]
        self._seed = config.training.seed
        self._augmentation = build_augmentation(config, config.data.flip_probability)

    def __len__(self) -> int:
        """Images of one epoch; positions go on beyond it."""
        return len(self._images)

    def sources(self) -> dict[str, HasFiles]:
        """The images of every source, by its number and its path in the config."""
        return dict(zip(self._paths, self._images, strict=True))

    def __getitem__(self, position: int) -> Tensor:
        """Returns the view at a position, (3, image_size, image_size) float32 in [-1, 1].

        In the place of a broken image stands the next one, with a warning.

        Raises:
            ConfigError: if no image can be read.
        """
        count = len(self._images)
        epochs, samples = samples_at(self._seed, (_STREAM,), np.array([position]), count)
        epoch, sample = int(epochs[0]), int(samples[0])
        for index in range(sample, sample + count):
            try:
                source, number = self._images.locate(index % count)
                image = source.image(number, self._augmentation.min_side)
            except BrokenRecord as error:
                warnings.warn(f"left out: {error}", stacklevel=2)
            else:
                return self._augmentation(image, sample_rng(self._seed, "tokenizer view", epoch, sample))[1]
        raise ConfigError(f"data: none of the {count} training images can be read.")


def build_view_loader(images: Dataset[Tensor], batches: Iterable[range], num_workers: int) -> DataLoader[Tensor]:
    """Reads the views at the positions of each batch, in order: (positions, 3, S, S) float32 each.

    Workers import the program's main module anew, which must start under `if __name__ == "__main__"`.

    Args:
        images: views by position.
        batches: positions of one batch each; read once.
        num_workers: processes that read ahead; 0 reads in this one.
    """
    if num_workers == 0:
        return DataLoader(images, batch_sampler=batches)  # type: ignore[arg-type]  # any iterable of indices will do
    # Plain fork would copy the locks of threads that exist by now.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    return DataLoader(
        images,
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=num_workers,
        worker_init_fn=_use_one_thread,
        multiprocessing_context=context,
    )


def _use_one_thread(worker: int) -> None:
    """Keeps workers from fighting with the training process for its cores."""
    torch.set_num_threads(1)
