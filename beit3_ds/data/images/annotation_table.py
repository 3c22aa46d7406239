"""Stores parsed annotations in binary tables, so that a run does not parse annotation files.

`beit3 prepare index` writes the tables. A table contains, in this order:

1. one line of JSON: the size and modification time of each annotation file, the numbers of samples and images, the
   total bytes of the image paths, and the total bytes of the captions;
2. little-endian int64 numbers: the image index of each sample, the end offset of each image path, and the end offset of
   each caption;
3. the image paths and the captions in UTF-8.

The line of JSON also counts the skipped rows and files by reason, and gives one example for each reason.

All processes of a host memory-map the file and share its pages.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from beit3_ds.atomic_file import atomic_write, bounded_name
from beit3_ds.config import ConfigError
from beit3_ds.data.images.annotated import AnnotatedImages, describe_files
from beit3_ds.data.images.compact_strings import StoredStrings
from beit3_ds.data.images.shard_index import parse_skipped, read_first_line
from beit3_ds.untrusted_json import check_count, check_list

_FORMAT = 1


class StoredAnnotations(AnnotatedImages):
    """Reads samples from a memory-mapped annotation table. A pickled copy opens its own memory map."""

    def __init__(self, path: str, files: Sequence[str], folder: str) -> None:
        """Opens a table and checks that the annotation files have not changed since the table was written.

        Args:
            path: path of the table.
            files: paths of the annotation files; some formats have two.
            folder: folder of the images.

        Raises:
            ConfigError: if the table is damaged, or the size or modification time of an annotation file has changed.
        """
        self._path, self._files = path, files
        try:
            start, header = read_first_line(path, _FORMAT)
            num_samples, num_images, path_bytes, caption_bytes = map(check_count, check_list(header["sizes"], 4))
            num_numbers = 2 * num_samples + num_images
            if os.path.getsize(path) != start + 8 * num_numbers + path_bytes + caption_bytes:
                raise ValueError("truncated or overwritten")
            skipped, made_from = parse_skipped(header["skipped"]), check_list(header["made_from"], len(files))
            data = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))[start:]
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"data: table {path} of {files[0]} is damaged: {error}. Run `beit3 prepare index`."
            ) from error
        for name, then, now in zip(files, made_from, describe_files(files), strict=True):
            if then != now:
                raise ConfigError(
                    f"data: {name} has size and mtime_ns {now}, its table {path} was made from {then}. If the change "
                    "is meant, run `beit3 prepare index` again; else fetch the file again."
                )
        numbers, paths, captions = np.split(data, np.cumsum([8 * num_numbers, path_bytes]))
        image_numbers, path_ends, caption_ends = np.split(numbers.view("<i8"), np.cumsum([num_samples, num_images]))
        super().__init__(
            files[0],
            folder,
            StoredStrings(paths, path_ends),
            StoredStrings(captions, caption_ends),
            image_numbers,
            skipped,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # NumPy would pickle a map as a copy of its contents.
        return StoredAnnotations, (self._path, self._files, self.images.path)


def table_path(cache_dir: str, kind: str, annotations: str, folder: str) -> str:
    """Returns the path of a table, `cache_dir`/index/NAME.DIGEST.table.

    NAME is the file name of `annotations`. DIGEST is computed from `kind`, `annotations` and `folder`.

    Args:
        cache_dir: folder of caches.
        kind: format of the annotation file, such as `coco`.
        annotations: path of the annotation file.
        folder: folder of the images.
    """
    facts = "\0".join((kind, os.path.abspath(annotations), os.path.abspath(folder)))
    digest = hashlib.sha256(os.fsencode(facts)).hexdigest()[:12]
    return os.path.join(cache_dir, "index", f"{bounded_name(os.path.basename(annotations))}.{digest}.table")


def write_table(samples: AnnotatedImages, path: str, made_from: list[list[int]]) -> None:
    """Writes samples to a table atomically: a failed write leaves no partial table.

    Args:
        samples: all samples of the annotation files.
        path: path of the table.
        made_from: result of `describe_files`, computed before the annotation files were read.

    Raises:
        OSError: if the folder cannot be written.
    """
    header = {
        "format": _FORMAT,
        "made_from": made_from,
        "sizes": (len(samples), len(samples.paths), len(samples.paths.text), len(samples.captions.text)),
        "skipped": samples.skipped,
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(Path(path)) as file:
        file.write(json.dumps(header).encode("ascii") + b"\n")
        for numbers in (samples.image_numbers, samples.paths.ends, samples.captions.ends):
            file.write(np.asarray(numbers, dtype="<i8").data)
        for text in (samples.paths.text, samples.captions.text):
            file.write(np.asarray(text, dtype=np.uint8).data)
