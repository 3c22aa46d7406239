"""Samples by number: what every stream of a task offers, whatever its samples are."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from beit3_ds.config import DataConfig
from beit3_ds.data.files.fingerprint import SourceFile
from beit3_ds.data.files.records import Skipped
from beit3_ds.data.randomness import sample_rng
from beit3_ds.data.sources import Parts

VALIDATION_EPOCH = -1
"""Epoch of validation samples: one draw for all evaluations, and none of those of training."""


@dataclass(frozen=True)
class SampleKey:
    """All that the draws of one sample depend on."""

    seed: int
    """The run's seed."""
    stream: str
    """Name of the stream."""
    epoch: int
    """How often the sample's source, or the unweighted stream, was used up before; `VALIDATION_EPOCH` for validation
    samples."""
    index: int
    """Number of the sample in its stream."""

    def rng(self, purpose: str) -> np.random.Generator:
        """The generator of one purpose; each has its own, so that one more draw here moves nothing there."""
        return sample_rng(self.seed, purpose, self.stream, self.epoch, self.index)


class SourceSamples(Protocol):
    """The samples of one source, as a task prepares them."""

    is_last_open: ClassVar[bool]
    """Whether the last sample may still grow when its files do."""

    def __len__(self) -> int:
        """Samples of the source, broken ones included."""

    def files(self) -> Iterable[SourceFile]:
        """Returns the files of the source."""

    def identity(self, index: int) -> bytes:
        """Returns what tells a sample from others, to detect whether samples were renumbered."""

    def name(self, index: int) -> str:
        """Returns the file of a sample and its name there, for messages."""

    def skipped(self) -> dict[str, Skipped]:
        """Returns files, members, rows and lines that are no samples, by the reason."""

    def prepare(self, index: int, key: SampleKey) -> Any:
        """Reads sample `index` of the source and makes its draws by `key`.

        Raises:
            BrokenRecordError: if it cannot be read.
        """


@dataclass(frozen=True)
class Stream:
    """One stream of a task: the samples of all its sources, numbered consecutively."""

    parts: Parts[SourceSamples]
    """The samples of each source."""

    def __len__(self) -> int:
        """Samples of the stream, broken ones included."""
        return len(self.parts)

    def name(self, index: int) -> str:
        """Returns the file of a sample and its name there, for messages; the same in every run."""
        part, number = self.parts.locate(index)
        return part.name(number)

    def prepare(self, key: SampleKey) -> Any:
        """Reads sample `key.index` and makes its draws.

        Raises:
            BrokenRecordError: if it cannot be read.
        """
        part, index = self.parts.locate(key.index)
        return part.prepare(index, key)


def name_sources(
    part: Literal["train", "validation"], streams: Mapping[str, Stream], data: DataConfig
) -> dict[str, SourceSamples]:
    """Returns the sources of streams by their names in the config, such as "data.images.train[0] (images/*.tar)"."""
    return {
        f"data.{name}.{part}[{number}] ({source.path})": samples
        for name, stream in streams.items()
        for number, (source, samples) in enumerate(zip(getattr(data.streams()[name], part), stream.parts, strict=True))
    }
