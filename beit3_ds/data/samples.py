"""Defines streams of numbered samples, from which tasks read."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from PIL import Image

from beit3_ds.config import DataConfig
from beit3_ds.config.data import Split
from beit3_ds.data.files.descriptors import OpenFiles
from beit3_ds.data.files.fingerprint import SourceFile
from beit3_ds.data.files.records import Skipped
from beit3_ds.data.images.annotated import AnnotatedImages
from beit3_ds.data.images.augmentation import ViewTransform
from beit3_ds.data.images.captioned import EachImage
from beit3_ds.data.images.source import ImageSource
from beit3_ds.data.randomness import sample_rng
from beit3_ds.data.sources import ConcatSources, check_no_file_twice, open_images

VALIDATION_EPOCH = -1
"""Epoch number of validation and test samples, so that their random draws never change and differ from training's."""


@dataclass(frozen=True)
class SampleKey:
    """Holds everything that the random draws of one sample depend on."""

    seed: int
    """Seed of the run."""
    stream: str
    """Name of the stream."""
    epoch: int
    """Number of earlier passes over the sample's source, or over the whole stream without weights; `VALIDATION_EPOCH`
    for validation and test samples."""
    index: int
    """Index of the sample in its stream, from 0."""

    def rng(self, purpose: str) -> np.random.Generator:
        """Returns the sample's random generator for one purpose; generators for different purposes are independent."""
        return sample_rng(self.seed, purpose, self.stream, self.epoch, self.index)


class SourceSamples(Protocol):
    """Declares the interface of one source's samples, which each task implements."""

    is_last_open: ClassVar[bool]
    """Whether the last sample may change when its file grows, as the last sequence of a text file does."""

    def __len__(self) -> int:
        """Returns the number of samples in the source, broken ones included."""

    def files(self) -> Iterable[SourceFile]:
        """Returns the name, size in bytes and number of samples of each file of the source."""

    def identity(self, index: int) -> bytes:
        """Returns bytes that identify a sample; a resumed run compares them to detect inserted or removed samples."""

    def name(self, index: int) -> str:
        """Returns the file that contains a sample, and the sample's name in the file, for messages."""

    def skipped(self) -> dict[str, Skipped]:
        """Returns the number of skipped files, members, rows and lines, with an example, by reason."""

    def prepare(self, index: int, key: SampleKey) -> Any:
        """Reads and prepares sample `index` of the source; `key` seeds all its random draws.

        Raises:
            BrokenRecordError: if the sample cannot be read.
        """


@dataclass(frozen=True, kw_only=True)
class ImagesOfSource:
    """Holds the images of one source; subclasses in the tasks implement `prepare`."""

    is_last_open: ClassVar[bool] = False

    source: ImageSource
    """Source of the images and captions."""

    def __len__(self) -> int:
        """Returns the number of samples, broken ones included."""
        return len(self.source)

    def files(self) -> Iterable[SourceFile]:
        """Returns the name, size in bytes and number of samples of each file of the source."""
        return self.source.files()

    def identity(self, index: int) -> bytes:
        """Returns the name of a sample, without folders, as bytes; a resumed run recognises the sample by this name."""
        return os.path.basename(self.source.name(index)).encode("utf-8", "surrogatepass")

    def name(self, index: int) -> str:
        """Returns the file that contains a sample, and the sample's name in the file, for messages."""
        return self.source.name(index)

    def skipped(self) -> dict[str, Skipped]:
        """Returns the number of skipped files, members and rows of the source, with an example, by reason."""
        return self.source.skipped


@dataclass(frozen=True, kw_only=True)
class ImageSourceSamples(ImagesOfSource):
    """Holds the images of one source, and the transform that makes two views of each image, as in pretraining."""

    views: ViewTransform
    """Makes one view of an image for the model and one for the visual tokenizer."""

    def read(self, index: int) -> Image.Image:
        """Reads the image of sample `index`, large enough for both views.

        Raises:
            BrokenRecordError: if the image cannot be read.
        """
        return self.source.image(index, self.views.min_side)


@dataclass(frozen=True, kw_only=True)
class CaptionedSamples(ImagesOfSource):
    """Holds the images of one source with one caption per sample, or with several if the source is an `EachImage`."""

    def image_files(self) -> Iterable[str]:
        """Returns the paths of all images that the annotations name; empty for a folder or tars."""
        return self.source.image_files() if isinstance(self.source, AnnotatedImages) else ()

    def identifier(self, index: int) -> int | str:
        """Returns the image's identifier for result files, from the annotation file or else the image's name."""
        return self.source.identifier(index) if isinstance(self.source, EachImage) else self.source.name(index)

    def captions(self, index: int) -> list[str]:
        """Returns all captions of an image; an image of a test split may have no captions.

        Raises:
            BrokenRecordError: if a caption cannot be read.
        """
        return self.source.references(index) if isinstance(self.source, EachImage) else [self.source.caption(index)]


@dataclass(frozen=True)
class Stream:
    """Holds one stream of a task: the samples of all its sources, numbered consecutively."""

    sources: ConcatSources[SourceSamples]
    """The samples of each source."""
    sequences_per_sample: int = 1
    """Number of sequences that a sample takes in the packed batch: 2 if its image and its text are separate."""

    def __len__(self) -> int:
        """Returns the number of samples in the stream, broken ones included."""
        return len(self.sources)

    def name(self, index: int) -> str:
        """Returns the file that contains a sample, and the sample's name in the file, as one text for messages."""
        source, number = self.sources.locate(index)
        return source.name(number)

    def prepare(self, key: SampleKey) -> Any:
        """Reads and prepares sample `key.index`; `key` seeds all its random draws.

        Raises:
            BrokenRecordError: if the sample cannot be read.
        """
        source, index = self.sources.locate(key.index)
        return source.prepare(index, key)


def name_sources(split: Split, streams: Mapping[str, Stream], data: DataConfig) -> dict[str, SourceSamples]:
    """Returns the samples of each source, by a name such as "data.images.train[0] (images/*.tar)".

    If a task opens other sources than the config names, their names have no path.
    """
    named: dict[str, SourceSamples] = {}
    for name, stream in streams.items():
        configured = data.streams().get(name)
        paths = [f" ({source.path})" for source in getattr(configured, split, ())]
        has_paths = len(paths) == len(stream.sources.sizes)
        for number, samples in enumerate(stream.sources):
            named[f"data.{name}.{split}[{number}]{paths[number] if has_paths else ''}"] = samples
    return named


def open_image_stream(data: DataConfig, stream: str, split: Split, build: Callable[..., SourceSamples]) -> Stream:
    """Opens the image files of a stream.

    Args:
        data: the configuration's data section.
        stream: name of the stream.
        split: split whose sources are opened.
        build: builds the samples of one source; it is called with the opened images as `source`.

    Raises:
        ConfigError: if files are missing or cannot be read.
    """
    files, sources = OpenFiles(data.max_open_files), getattr(data.streams()[stream], split)
    check_no_file_twice(sources)
    return Stream(ConcatSources([build(source=open_images(source, data.cache_dir, files)) for source in sources]))
