"""Opens the image sources that a config names, and numbers the samples of several sources."""

import bisect
import itertools
import os
from collections.abc import Iterator, Sequence, Sized
from typing import Generic, TypeVar

import numpy as np

from beit3_ds.config import ConfigError, SourceConfig
from beit3_ds.data.files.descriptors import OpenFiles
from beit3_ds.data.files.patterns import check_no_hard_link, expand_patterns, is_inside
from beit3_ds.data.images.annotated import NO_IMAGE, AnnotatedImages
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
from beit3_ds.printing import printable

_IMAGES_AT_START = 16  # images that a process looks for when it opens annotations; `beit3 prepare index` looks for all
SourceT = TypeVar("SourceT", bound=Sized)


class ConcatSources(Generic[SourceT]):
    """Concatenates sources; numbers all samples consecutively."""

    def __init__(self, sources: Sequence[SourceT]) -> None:
        """Stores the sources; the samples of the first source have the smallest numbers."""
        self._sources = sources
        self.sizes = tuple(len(source) for source in sources)
        self._ends = list(itertools.accumulate(self.sizes))

    def __len__(self) -> int:
        """Returns the number of samples in all sources."""
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[SourceT]:
        """Yields the sources in order."""
        return iter(self._sources)

    def source_of(self, index: int) -> int:
        """Returns the index of the source that contains sample `index`."""
        assert 0 <= index < len(self), f"sample {index} of {len(self)}"
        return bisect.bisect_right(self._ends, index)

    def locate(self, index: int) -> tuple[SourceT, int]:
        """Returns the source that contains sample `index`, and the index of the sample within that source."""
        source = self.source_of(index)
        return self._sources[source], index - self._ends[source] + self.sizes[source]


def check_no_sample_twice(sources: Sequence[SourceConfig], must_exist: bool = True) -> None:
    """Checks that no two sources of one stream use the same samples.

    Two sources must not share a file or a folder, unless both set `split` and the values differ. Different splits share
    no sample. A source's folder must never be inside another source's folder.

    Args:
        sources: sources of one stream, such as all sources of image-text pairs.
        must_exist: whether a pattern without a matching file is an error.

    Raises:
        ConfigError: if two sources break these rules, or if `must_exist` is True and a pattern matches no file.
    """
    for split in {source.split for source in sources}:  # sources with different splits of one file share no sample
        paths = [source.path for source in sources if source.split in (split, "")]
        check_no_hard_link(expand_patterns(paths if must_exist else filter(_matches_files, paths)))
    folders = [source.path for source in sources if os.path.isdir(source.path)]
    for inner, outer in itertools.permutations(folders, 2):
        if is_inside(inner, outer):
            raise ConfigError(
                f"data: the folder {printable(inner)} is inside {printable(outer)}, another source of its stream. Its "
                "images would count twice: leave one of the two out."
            )


def _matches_files(pattern: str) -> bool:
    try:
        return bool(expand_patterns([pattern]))
    except ConfigError:
        return False


def image_format(source: SourceConfig) -> str:
    """Returns the format of an image source.

    Without a format in the config, the path of a folder gives "folder", and any other path gives "tar".
    """
    return source.format or ("folder" if os.path.isdir(source.path) else "tar")


def annotation_files(source: SourceConfig) -> list[str]:
    """Returns the paths of a source's annotation files; the source must have an annotation format, such as `coco`."""
    if source.format == "visual_genome":
        return [source.path, os.path.join(os.path.dirname(source.path), "image_data.json")]
    return [source.path]


def source_table(source: SourceConfig, cache_dir: str) -> str:
    """Returns the path of a source's annotation table. `beit3 prepare index` writes the table."""
    return table_path(cache_dir, image_format(source), source.path, source.images)


def read_annotations(source: SourceConfig) -> AnnotatedImages:
    """Parses the annotation files of a source; the source must have an annotation format, such as `coco`.

    Raises:
        ConfigError: if files are missing or cannot be read.
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


def count_missing_images(samples: AnnotatedImages, num_examined: int | None = None) -> tuple[int, str]:
    """Counts the images that the annotations name but that do not exist.

    Args:
        samples: an opened source in an annotation format.
        num_examined: number of images to look for, evenly spread; None looks for all images.

    Returns:
        Number of examined images that are missing, and the path of the first missing image, or "" if none is missing.

    Raises:
        ConfigError: if there are no samples, or none of the examined images exists.
        StorageError: if the file system fails.
    """
    if not len(samples):
        reasons = "; ".join(f"{found.num_members:,} {reason}" for reason, found in samples.skipped.items())
        raise ConfigError(
            f"data: no row of {printable(samples.annotations)} has an image in {printable(samples.images.path)}"
            f"{f' ({reasons})' if reasons else ''}. Correct 'images' or the path in the config."
        )
    count = len(samples.paths)
    numbers = range(count) if num_examined is None else spread(count, num_examined)
    missing = [number for number in numbers if not samples.images.holds(samples.paths[number])]
    if missing and len(missing) == len(numbers):
        raise ConfigError(
            f"data: none of {len(numbers):,} images that {printable(samples.annotations)} names is in "
            f"{printable(samples.images.path)}, such as {printable(samples.paths[missing[0]])}. Correct 'images' in "
            "the config: it must be the folder in which these files are."
        )
    return len(missing), printable(samples.paths[missing[0]]) if missing else ""


def check_no_image_is_missing(samples: AnnotatedImages) -> None:
    """Checks that the images of all samples exist; lists each folder once and opens no image.

    Raises:
        ConfigError: if images are missing. The message gives their number, and the first sample whose image is missing.
        StorageError: if the file system fails.
    """
    paths = [samples.paths[number] for number in range(len(samples.paths))]
    missing = set(samples.images.missing(paths))
    if not missing:
        return
    wanted = (number != NO_IMAGE and paths[number] in missing for number in samples.image_numbers)
    first = next((sample for sample, is_missing in enumerate(wanted) if is_missing), None)
    if first is None:  # no sample uses the missing images
        return
    raise ConfigError(
        f"data: {printable(samples.images.path)} lacks {len(missing):,} of {len(paths):,} images. The first is that of "
        f"{samples.name(first)}. Correct 'images' in the config, fetch the missing images, or remove their entries."
    )


def spread(length: int, count: int) -> list[int]:
    """Returns at most `count` indices in [0, length), evenly spread from the first to the last."""
    return np.unique(np.linspace(0, length - 1, min(length, count)).round().astype(np.int64)).tolist()


def open_images(source: SourceConfig, cache_dir: str | None, files: OpenFiles | None = None) -> ImageSource:
    """Opens an image source in any format.

    Args:
        source: config of the source.
        cache_dir: folder of the tar indices and annotation tables from `beit3 prepare index`. Tars without an index are
            scanned, and annotation files without a table are parsed. If there is no folder (None), all tars are scanned
            and all annotation files are parsed.
        files: cache of open files; all sources of a process should share it.

    Raises:
        ConfigError: if files are missing, cannot be read, or do not match their index or table.
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
    count_missing_images(samples, _IMAGES_AT_START)
    return samples
