"""Opens what a config names as the sources of a stream."""

import bisect
import itertools
import os
from collections.abc import Iterator, Sequence, Sized
from typing import Generic, TypeVar

import numpy as np

from beit3_ds.config import ConfigError, SourceConfig
from beit3_ds.data.files.descriptors import OpenFiles
from beit3_ds.data.files.patterns import check_no_hard_link, expand_patterns, is_inside
from beit3_ds.data.files.printing import printable
from beit3_ds.data.images.annotated import AnnotatedImages
from beit3_ds.data.images.annotation_table import StoredAnnotations, table_path
from beit3_ds.data.images.annotations import (
    read_coco_captions,
    read_conceptual_captions,
    read_sbu_captions,
    read_visual_genome,
)
from beit3_ds.data.images.folder import ImageFolder
from beit3_ds.data.images.shards import TarShards
from beit3_ds.data.images.source import ImageSource

_IMAGES_AT_START = 16  # every process looks for these when it opens annotations; `beit3 prepare index` looks for all
PartT = TypeVar("PartT", bound=Sized)


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

    def __iter__(self) -> Iterator[PartT]:
        """Yields the parts."""
        return iter(self._parts)

    def part_of(self, index: int) -> int:
        """Returns the number of the part that holds sample `index`."""
        assert 0 <= index < len(self), f"sample {index} of {len(self)}"
        return bisect.bisect_right(self._ends, index)

    def locate(self, index: int) -> tuple[PartT, int]:
        """Returns the part that holds sample `index` and the sample's number there."""
        part = self.part_of(index)
        return self._parts[part], index - self._ends[part] + self.sizes[part]


def check_no_file_twice(sources: Sequence[SourceConfig], must_exist: bool = True) -> None:
    """Refuses sources of one stream that share a file or contain each other, because samples would count twice.

    Args:
        sources: of one stream.
        must_exist: also refuse patterns without a match; otherwise they count as no files.

    Raises:
        ConfigError: naming the file or the folders, or a pattern without a match.
    """
    paths = [source.path for source in sources]
    check_no_hard_link(expand_patterns(paths if must_exist else filter(_matches_files, paths)))
    folders = [source.path for source in sources if os.path.isdir(source.path)]
    for inner, outer in itertools.permutations(folders, 2):
        if is_inside(inner, outer):
            raise ConfigError(
                f"data: the folder {printable(inner)} lies in {printable(outer)}, which is another source of its "
                "stream, so its images would count twice. Leave one of the two out."
            )


def _matches_files(pattern: str) -> bool:
    try:
        return bool(expand_patterns([pattern]))
    except ConfigError:
        return False


def image_format(source: SourceConfig) -> str:
    """The format of a source of images, inferred if its config leaves it open."""
    return source.format or ("folder" if os.path.isdir(source.path) else "tar")


def annotation_files(source: SourceConfig) -> list[str]:
    """The files that a source of an annotation format is read from, beside its images."""
    if source.format == "visual_genome":
        return [source.path, os.path.join(os.path.dirname(source.path), "image_data.json")]
    return [source.path]


def source_table(source: SourceConfig, cache_dir: str) -> str:
    """Where the table of a source of an annotation format lies."""
    return table_path(cache_dir, image_format(source), source.path, source.images)


def read_annotations(source: SourceConfig) -> AnnotatedImages:
    """Parses the files of a source of an annotation format.

    Raises:
        ConfigError: for files that are missing or cannot be read.
    """
    match source.format:
        case "coco":
            return read_coco_captions(source.path, source.images)
        case "visual_genome":
            regions, image_data = annotation_files(source)
            return read_visual_genome(regions, image_data, source.images)
        case "sbu":
            return read_sbu_captions(source.path, source.images)
        case "conceptual_captions":
            return read_conceptual_captions(source.path, source.images, "caption_url")
        case "conceptual_12m":
            return read_conceptual_captions(source.path, source.images, "url_caption")
        case kind:
            raise AssertionError(f"no reader for the format {kind}")


def check_images_are_there(samples: AnnotatedImages, num_examined: int | None = None) -> tuple[int, str]:
    """Looks for the images that annotations name.

    Args:
        samples: an opened source of an annotation format.
        num_examined: number of images to look for, evenly spread; None looks for all.

    Returns:
        The number of missing images, and the path of the first one.

    Raises:
        ConfigError: if there are no samples, or all images are missing.
        StorageError: if the file system fails.
    """
    if not len(samples):
        reasons = "; ".join(f"{found.num_members:,} {reason}" for reason, found in samples.skipped.items())
        raise ConfigError(
            f"data: no row of {printable(samples.annotations)} has an image in {printable(samples.images.path)}"
            f"{f' ({reasons})' if reasons else ''}. Correct 'images' or the path in the config."
        )
    count = len(samples.paths)
    places = range(count) if num_examined is None else spread(count, num_examined)
    missing = [number for number in places if not samples.images.holds(samples.paths[number])]
    if missing and len(missing) == len(places):
        raise ConfigError(
            f"data: none of {len(places):,} images that {printable(samples.annotations)} names is in "
            f"{printable(samples.images.path)}, such as {printable(samples.paths[missing[0]])}. Correct 'images' in "
            "the config: it must be the folder in which these names lie."
        )
    return len(missing), printable(samples.paths[missing[0]]) if missing else ""


def spread(length: int, count: int) -> list[int]:
    """Returns up to `count` indices of a sequence, evenly spread from the first to the last."""
    return np.unique(np.linspace(0, length - 1, min(length, count)).round().astype(np.int64)).tolist()


def open_images(source: SourceConfig, cache_dir: str | None, files: OpenFiles | None = None) -> ImageSource:
    """Opens a source of images.

    Args:
        source: names format and files.
        cache_dir: where `beit3 prepare index` wrote the indices of tars and the tables of annotations. Files without
            one are scanned or parsed; None scans or parses all.
        files: keeps tars and indices open; sources of one process should share it.

    Raises:
        ConfigError: for files that are missing or cannot be read, or that no longer fit what was prepared.
    """
    match image_format(source):
        case "tar":
            return TarShards([source.path], cache_dir, files)
        case "folder":
            return ImageFolder(source.path)
    if cache_dir is not None and os.path.exists(table := source_table(source, cache_dir)):
        samples: AnnotatedImages = StoredAnnotations(table, annotation_files(source), source.images)
    else:
        samples = read_annotations(source)
    check_images_are_there(samples, _IMAGES_AT_START)
    return samples
