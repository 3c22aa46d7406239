"""Defines the streams of samples that a task reads: images, image-text pairs and texts."""

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
from beit3_ds.data.sources import ConcatSources, check_no_sample_twice, open_images

VALIDATION_EPOCH = -1
"""Epoch of validation and test samples. Their random draws are fixed and differ from the draws in training."""


@dataclass(frozen=True)
class SampleKey:
    """Determines all random draws for one sample."""

    seed: int
    """Seed of the run."""
    stream: str
    """Name of the stream, such as "pairs"."""
    epoch: int
    """Number of earlier passes over the sample's source. If the stream's sources have no sampling weights, passes over
    the whole stream are counted instead.

    `VALIDATION_EPOCH` for validation and test samples.
    """
    index: int
    """Index of the sample in the stream, from 0."""

    def rng(self, purpose: str) -> np.random.Generator:
        """Returns this sample's random generator for one purpose; different purposes have independent generators."""
        return sample_rng(self.seed, purpose, self.stream, self.epoch, self.index)


class SourceSamples(Protocol):
    """Interface of one source's samples. Each task implements this interface."""

    is_last_open: ClassVar[bool]
    """Whether the last sample may change when its file grows. True for text, where new lines may join the last
    sequence."""

    def __len__(self) -> int:
        """Returns the number of samples in the source, including broken samples."""

    def files(self) -> Iterable[SourceFile]:
        """Returns a description of each file of the source: name, size in bytes and number of samples."""

    def identity(self, index: int) -> bytes:
        """Returns bytes that identify a sample; a resumed run compares them to detect inserted or removed samples."""

    def name(self, index: int) -> str:
        """Returns a sample's name for messages, including the file that contains the sample."""

    def skipped(self) -> dict[str, Skipped]:
        """Returns the number of skipped files, tar members, rows and lines for each reason, with an example."""

    def prepare(self, index: int, key: SampleKey) -> Any:
        """Reads and prepares sample `index` of the source; `key` determines all random draws.

        Raises:
            BrokenRecordError: if the sample cannot be read.
        """


@dataclass(frozen=True, kw_only=True)
class ImagesOfSource:
    """Base class for the image samples of one source; subclasses in the tasks implement `prepare`."""

    is_last_open: ClassVar[bool] = False

    source: ImageSource
    """Source of the images and captions."""

    def __len__(self) -> int:
        """Returns the number of samples, including broken samples."""
        return len(self.source)

    def files(self) -> Iterable[SourceFile]:
        """Returns a description of each file of the source: name, size in bytes and number of samples."""
        return self.source.files()

    def identity(self, index: int) -> bytes:
        """Returns the part of a sample's name after the last slash, as bytes. A resumed run recognises the sample by
        these bytes.
        """
        return os.path.basename(self.source.name(index)).encode("utf-8", "surrogatepass")

    def name(self, index: int) -> str:
        """Returns a sample's name for messages, including the file that contains the sample."""
        return self.source.name(index)

    def skipped(self) -> dict[str, Skipped]:
        """Returns the number of skipped files, tar members and rows for each reason, with an example."""
        return self.source.skipped


@dataclass(frozen=True, kw_only=True)
class ImageSourceSamples(ImagesOfSource):
    """Base class for image samples with two views per image, as in pretraining."""

    views: ViewTransform
    """Transform that makes two views of an image: one for the model and one for the visual tokenizer."""

    def read(self, index: int) -> Image.Image:
        """Reads the image of sample `index` at a size that suffices for the views that the transform `views` makes.

        Raises:
            BrokenRecordError: if the image cannot be read.
        """
        return self.source.image(index, self.views.min_side)


@dataclass(frozen=True, kw_only=True)
class CaptionedSamples(ImagesOfSource):
    """Base class for samples that are images with captions.

    If the source is an `EachImage`, a sample has all captions of its image; otherwise, it has one caption.
    """

    def image_files(self) -> Iterable[str]:
        """Returns the paths of all images that the annotations name; empty if the source is a folder or tars."""
        return self.source.image_files() if isinstance(self.source, AnnotatedImages) else ()

    def identifier(self, index: int) -> int | str:
        """Returns the image's identifier for result files; it is the image's name if the source has no identifiers."""
        return self.source.identifier(index) if isinstance(self.source, EachImage) else self.source.name(index)

    def captions(self, index: int) -> list[str]:
        """Returns all captions of an image; empty for an image of a test split.

        Raises:
            BrokenRecordError: if a caption cannot be read.
        """
        return self.source.references(index) if isinstance(self.source, EachImage) else [self.source.caption(index)]


@dataclass(frozen=True)
class Stream:
    """Holds all samples of one kind that a task reads: images, pairs or texts. Indices run over all sources."""

    sources: ConcatSources[SourceSamples]
    """Samples of each source."""
    sequences_per_sample: int = 1
    """Number of sequences per sample in the packed batch; 2 if the image and the text are separate sequences."""

    def __len__(self) -> int:
        """Returns the number of samples in the stream, including broken samples."""
        return len(self.sources)

    def name(self, index: int) -> str:
        """Returns a sample's name for messages, including the file that contains the sample."""
        source, number = self.sources.locate(index)
        return source.name(number)

    def prepare(self, key: SampleKey) -> Any:
        """Reads and prepares sample `key.index`; `key` determines all random draws.

        Raises:
            BrokenRecordError: if the sample cannot be read.
        """
        source, index = self.sources.locate(key.index)
        return source.prepare(index, key)


def name_sources(split: Split, streams: Mapping[str, Stream], data: DataConfig) -> dict[str, SourceSamples]:
    """Maps names such as "data.images.train[0] (images/*.tar)" to the samples of each source.

    If the number of a stream's sources differs from the config, the names of these sources contain no path.
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
    """Opens the image files of a stream of images or image-text pairs.

    Args:
        data: data section of the run's config.
        stream: name of the stream, such as "images" or "pairs".
        split: split to open.
        build: function that builds the samples of one source. It is called with the opened images as `source`.

    Raises:
        ConfigError: if files are missing or cannot be read.
    """
    files, sources = OpenFiles(data.max_open_files), getattr(data.streams()[stream], split)
    check_no_sample_twice(sources)
    return Stream(ConcatSources([build(source=open_images(source, data.cache_dir, files)) for source in sources]))
