"""Opens what a config names as the sources of a stream."""

import bisect
import itertools
import os
from collections.abc import Sequence, Sized
from typing import Generic, Protocol, TypeVar

from PIL import Image

from beit3_ds.config import ConfigError, SourceConfig
from beit3_ds.data.files import expand_patterns
from beit3_ds.data.shards import TarShards

PartT = TypeVar("PartT", bound=Sized)


class ImageSource(Protocol):
    """Random access to images and, where the source has them, their captions."""

    def __len__(self) -> int:
        """Samples, broken ones included: what stands where must not depend on what can be read."""

    def name(self, index: int) -> str:
        """Where a sample lies, for messages."""

    def image(self, index: int) -> Image.Image:
        """Decodes an image, upright and in RGB; raises BrokenRecord if it cannot be read."""

    def caption(self, index: int) -> str:
        """Returns a caption; raises BrokenRecord if there is none or it cannot be read."""


class Parts(Generic[PartT]):
    """Several sets of samples that are numbered through."""

    def __init__(self, parts: Sequence[PartT]) -> None:
        """Takes the parts in the order of their numbers."""
        self._parts = parts
        self.sizes = tuple(len(part) for part in parts)
        self._ends = list(itertools.accumulate(self.sizes))

    def __len__(self) -> int:
        """Samples of all parts."""
        return self._ends[-1] if self._ends else 0

    def locate(self, index: int) -> tuple[PartT, int]:
        """Returns the part that holds sample `index` and the sample's number there."""
        assert 0 <= index < len(self), f"sample {index} of {len(self)}"
        part = bisect.bisect_right(self._ends, index)
        return self._parts[part], index - self._ends[part] + self.sizes[part]


def check_no_file_twice(sources: Sequence[SourceConfig]) -> None:
    """Refuses sources of one stream that share a file: its samples would count twice.

    Raises:
        ConfigError: naming the file, or a pattern without a match.
    """
    expand_patterns([source.path for source in sources])


def open_images(source: SourceConfig) -> ImageSource:
    """Opens a source of images.

    Raises:
        ConfigError: for files that are missing or cannot be read, or a format that has no reader.
    """
    kind = source.format or ("folder" if os.path.isdir(source.path) else "tar")
    if kind == "tar":
        return TarShards([source.path])
    raise ConfigError(f"data: source '{source.path}' has the format {kind}, which cannot be read. Use tar shards.")
