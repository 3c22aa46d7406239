"""Opens streams of numbered samples, for any task."""

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
"""Epoch of validation and test samples: all evaluations share its draws, and training never has them."""


@dataclass(frozen=True)
class SampleKey:
    """Holds everything that the random draws of one sample depend on."""

    seed: int
    """Seed of the run."""
    stream: str
    """Name of the stream."""
    epoch: int
    """Number of times that the sample's source, or the stream without weights, was used up before; `VALIDATION_EPOCH`
    for validation samples."""
    index: int
    """Number of the sample in its stream."""

    def rng(self, purpose: str) -> np.random.Generator:
        """Returns an independent generator per purpose, so that more draws for one purpose do not change another's."""
        return sample_rng(self.seed, purpose, self.stream, self.epoch, self.index)


class SourceSamples(Protocol):
    """Declares the samples of one source, as a task prepares them."""

    is_last_open: ClassVar[bool]
    """Whether the last sample may grow when its files grow."""

    def __len__(self) -> int:
        """Returns the number of samples in the source, broken ones included."""

    def files(self) -> Iterable[SourceFile]:
        """Returns the files of the source."""

    def identity(self, index: int) -> bytes:
        """Returns bytes that identify a sample, to detect renumbered samples."""

    def name(self, index: int) -> str:
        """Returns the file of a sample and its name there, for messages."""

    def skipped(self) -> dict[str, Skipped]:
        """Returns the files, members, rows and lines that are left out, by reason."""

    def prepare(self, index: int, key: SampleKey) -> Any:
        """Reads sample `index` of the source and draws its random numbers by `key`.

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
        """Returns the files of the source."""
        return self.source.files()

    def identity(self, index: int) -> bytes:
        """Returns the name of a sample in its file or folder as bytes (`prefix_digest.IdentifiedSamples`)."""
        return os.path.basename(self.source.name(index)).encode("utf-8", "surrogatepass")

    def name(self, index: int) -> str:
        """Returns the file of a sample and its name there, for messages."""
        return self.source.name(index)

    def skipped(self) -> dict[str, Skipped]:
        """Returns files, members and rows of the source that are no samples, by the reason."""
        return self.source.skipped


@dataclass(frozen=True, kw_only=True)
class ImageSourceSamples(ImagesOfSource):
    """Holds the images of one source and the transform that makes two views of each, as in pretraining."""

    views: ViewTransform
    """Transform that crops and resizes an image into its two views."""

    def read(self, index: int) -> Image.Image:
        """Reads the image of sample `index`, at least as large as the views need.

        Raises:
            BrokenRecordError: if it cannot be read.
        """
        return self.source.image(index, self.views.min_side)


@dataclass(frozen=True, kw_only=True)
class CaptionedSamples(ImagesOfSource):
    """Holds images of one source with one caption each, or with several if the source is an `EachImage`."""

    def image_files(self) -> Iterable[str]:
        """Returns the images that the annotations name; nothing for folders and tars (`NamesImages`)."""
        return self.source.image_files() if isinstance(self.source, AnnotatedImages) else ()

    def identifier(self, index: int) -> int | str:
        """Returns the identifier of an image in its file, or else its name, for result files."""
        return self.source.identifier(index) if isinstance(self.source, EachImage) else self.source.name(index)

    def captions(self, index: int) -> list[str]:
        """Returns all captions of an image; none in a test split.

        Raises:
            BrokenRecordError: if one cannot be read.
        """
        return self.source.references(index) if isinstance(self.source, EachImage) else [self.source.caption(index)]


@dataclass(frozen=True)
class Stream:
    """Holds one stream of a task: the samples of all its sources, numbered consecutively."""

    sources: ConcatSources[SourceSamples]
    """The samples of each source."""
    sequences_per_sample: int = 1
    """Sequences of the packed batch per sample, such as 2 for an image and a text that are encoded apart."""

    def __len__(self) -> int:
        """Returns the number of samples in the stream, broken ones included."""
        return len(self.sources)

    def name(self, index: int) -> str:
        """Returns the file of a sample and its name there, for messages; the same in every run."""
        source, number = self.sources.locate(index)
        return source.name(number)

    def prepare(self, key: SampleKey) -> Any:
        """Reads sample `key.index` and draws its random numbers.

        Raises:
            BrokenRecordError: if the sample cannot be read.
        """
        source, index = self.sources.locate(key.index)
        return source.prepare(index, key)


def name_sources(split: Split, streams: Mapping[str, Stream], data: DataConfig) -> dict[str, SourceSamples]:
    """Returns the samples of each source by its name in the config, such as "data.images.train[0] (images/*.tar)".

    A stream that the config lacks, because a task evaluates its samples in another way, has names without paths.
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
        split: which of its sources.
        build: makes the samples of a source, which it gets as `source`.

    Raises:
        ConfigError: for files that are missing or cannot be read.
    """
    files, sources = OpenFiles(data.max_open_files), getattr(data.streams()[stream], split)
    check_no_file_twice(sources)
    return Stream(ConcatSources([build(source=open_images(source, data.cache_dir, files)) for source in sources]))
