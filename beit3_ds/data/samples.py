"""Streams of numbered samples, for any task."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from beit3_ds.config import DataConfig
from beit3_ds.data.files.fingerprint import SourceFile
from beit3_ds.data.files.records import Skipped
from beit3_ds.data.randomness import sample_rng
from beit3_ds.data.sources import ConcatSources

VALIDATION_EPOCH = -1
"""Epoch of validation samples: all evaluations share its draws, and training never has them."""


@dataclass(frozen=True)
class SampleKey:
    """Everything that the random draws of one sample depend on."""

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
        """Returns the generator of one purpose; another purpose has another one, so more draws here change nothing
        there."""
        return sample_rng(self.seed, purpose, self.stream, self.epoch, self.index)


class SourceSamples(Protocol):
    """Samples of one source, as a task prepares them."""

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


@dataclass(frozen=True)
class Stream:
    """One stream of a task: the samples of all its sources, numbered consecutively."""

    sources: ConcatSources[SourceSamples]
    """The samples of each source."""

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


def name_sources(
    split: Literal["train", "validation"], streams: Mapping[str, Stream], data: DataConfig
) -> dict[str, SourceSamples]:
    """Returns the samples of each source by its name in the config, such as "data.images.train[0] (images/*.tar)"."""
    return {
        f"data.{name}.{split}[{number}] ({source.path})": samples
        for name, stream in streams.items()
        for number, (source, samples) in enumerate(
            zip(getattr(data.streams()[name], split), stream.sources, strict=True)
        )
    }
