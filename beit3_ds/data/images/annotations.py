"""Readers of the annotation files of public image-text corpora.

They follow the published descriptions of the formats (docs/data.md says what was tested).

| corpus | annotation file | image of a row |
|---|---|---|
| COCO Captions | `captions_*.json` | `file_name` of the image with its `image_id`, in the folder |
| Visual Genome | `region_descriptions.json` and `image_data.json` | last two parts of its URL: `VG_100K/2.jpg` |
| SBU Captions | `*_captions.txt`, one per line, or JSON with `captions` | file named by the row's number |
| Conceptual Captions | TSV: caption, URL; Conceptual 12M: URL, caption | file named by the row's number |

Rows are numbered from 0; `7.jpg`, `00007.png` and `00000/000000007.jpg` are images of row 7. Downloads of the last two
corpora are never complete, so a row without an image is skipped and counted in `skipped`. In the other formats a
missing image is a broken record.
"""

import contextlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from beit3_ds.config import ConfigError
from beit3_ds.data.files.kinds import kind_of_file
from beit3_ds.data.files.reading import open_for_reading
from beit3_ds.data.images.annotated import NO_IMAGE, AnnotatedImages, CollectedAnnotations
from beit3_ds.data.images.compact_strings import CompactStrings
from beit3_ds.data.images.folder import list_images

_CHUNK = 1 << 20
_JSON_LINES = (".jsonl", ".ndjson", ".jsonlines", ".ldjson")
_SEPARATORS = re.compile(r"[ \t\r\n,]*")


def read_coco_captions(annotations: str, folder: str) -> AnnotatedImages:
    """Reads COCO's captions (Chen et al., 2015, arXiv:1504.00325): one sample per annotation, in the order of the file.

    Args:
        annotations: JSON object with `images` (`id`, `file_name`) and `annotations` (`image_id`, `caption`).
        folder: folder of the files `file_name`, such as `train2014`.

    Raises:
        ConfigError: if the file cannot be read or does not have this form.
    """
    samples = CollectedAnnotations(annotations, folder)
    with _reading(annotations, "an object with 'images' (id, file_name) and 'annotations' (image_id, caption)"):
        content = _load_json(annotations)
        numbers: dict[object, int] = {}
        for image in content["images"]:
            if image["id"] in numbers:
                samples.skip("image id twice", str(image["id"]))
            else:
                numbers[image["id"]] = samples.add_image(str(image["file_name"]))
        for annotation in content["annotations"]:
            samples.add_sample(numbers.get(annotation["image_id"], NO_IMAGE), annotation.get("caption"))
    return samples


def read_visual_genome(region_descriptions: str, image_data: str, folder: str) -> AnnotatedImages:
    """Reads Visual Genome (Krishna et al., 2017, arXiv:1602.07332): the phrase of each region is a caption.

    Args:
        region_descriptions: JSON list of images (`id`, `regions`: a list of `phrase`); read one image at a time.
        image_data: JSON list of images (`image_id`, `url`).
        folder: folder of `VG_100K` and `VG_100K_2`.

    Raises:
        ConfigError: if a file cannot be read or does not have this form.
    """
    samples = CollectedAnnotations(region_descriptions, folder)
    with _reading(image_data, "a list of objects with 'image_id' and 'url'"):
        numbers = {
            image["image_id"]: samples.add_image("/".join(image["url"].split("/")[-2:]))
            for image in _iterate_json_list(image_data)
        }
    with _reading(region_descriptions, "a list of objects with 'id' and 'regions' (phrase)"):
        for image in _iterate_json_list(region_descriptions):
            for region in image["regions"]:
                samples.add_sample(numbers.get(image["id"], NO_IMAGE), region.get("phrase"))
    return samples


def read_sbu_captions(captions: str, folder: str) -> AnnotatedImages:
    """Reads SBU Captions (Ordonez et al., 2011): one caption per row; the file of URLs is not needed.

    Args:
        captions: text file with one caption per line, or, if its name ends in .json, object with the list `captions`.
        folder: folder of images that are named by their row's number; folders below it are searched too.

    Raises:
        ConfigError: if a file cannot be read or does not have this form, or the folder has no images.
    """
    samples = CollectedAnnotations(captions, folder)
    with _reading(captions, "one caption per line, or a JSON object with the list 'captions'"):
        rows = _load_json(captions)["captions"] if captions.lower().endswith(".json") else _lines(captions)
        _add_rows(samples, rows)
    return samples


def read_conceptual_captions(
    table: str, folder: str, columns: Literal["caption_url", "url_caption"]
) -> AnnotatedImages:
    """Reads Conceptual Captions (Sharma et al., 2018) or Conceptual 12M (Changpinyo et al., 2021, arXiv:2102.08981).

    Args:
        table: tab-separated values without a header line.
        folder: folder of images that are named by their row's number; folders below it are searched too.
        columns: `caption_url` for Conceptual Captions, `url_caption` for Conceptual 12M.

    Raises:
        ConfigError: if the file cannot be read, the columns are in the other order, or the folder has no images.
    """
    samples = CollectedAnnotations(table, folder)
    with _reading(table, f"lines of {columns.replace('_', ', tab, ')}"):
        _add_rows(samples, _caption_column(table, columns.split("_").index("caption")))
    return samples


def _add_rows(samples: CollectedAnnotations, captions: Iterable[object]) -> None:
    """Adds the rows that have an image; a row that is None has no caption."""
    paths, skipped = list_images(samples.images)
    for reason, found in skipped.items():
        samples.skip(reason, found.example, found.num_members)
    rows, numbers = _image_rows(paths, samples)
    position = 0  # rows and captions are both in ascending order
    for row, caption in enumerate(captions):
        has_image = position < len(rows) and rows[position] == row
        if caption is None:
            samples.skip("row without two columns", f"row {row}")
        elif not has_image:
            samples.skip("row without an image", f"row {row}")
        else:
            samples.add_sample(samples.add_image(paths[int(numbers[position])]), caption)
        position += has_image
    for number in numbers[position:]:
        samples.skip("image without a row", paths[int(number)])


def _image_rows(paths: CompactStrings, samples: CollectedAnnotations) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the rows that have an image, ascending, and the index of each one's path."""
    rows = np.full(len(paths), -1, dtype=np.int64)
    for number in range(len(paths)):
        stem = paths[number].rpartition("/")[2].partition(".")[0]
        if stem.isascii() and stem.isdigit() and len(stem) < 19:
            rows[number] = int(stem)
        else:
            samples.skip("image not named by a number", paths[number])
    unique, first = np.unique(rows, return_index=True)
    for number in np.setdiff1d(np.flatnonzero(rows >= 0), first):
        samples.skip("second image of a row", paths[int(number)])
    return unique[unique >= 0], first[unique >= 0]


def _caption_column(table: str, caption_column: int) -> Iterator[str | None]:
    for number, line in enumerate(_lines(table)):
        columns = line.split("\t")
        if len(columns) != 2:
            yield None
            continue
        if number == 0 and "://" not in columns[1 - caption_column]:
            raise ValueError(
                f"column {2 - caption_column} of the first line, {columns[1 - caption_column]!r}, is no URL"
            )
        yield columns[caption_column]


def _lines(path: str) -> Iterator[str]:
    if path.lower().endswith(_JSON_LINES):
        raise ValueError("it is JSON with one object per line, not one caption per line")
    _check_kind(path)
    # Reads bytes: only a newline ends a row, no other separator of Unicode, and one bad caption breaks one row.
    with open_for_reading(path) as file:
        for line in file:
            yield line.rstrip(b"\r\n").decode("utf-8", "surrogateescape")


def _check_kind(path: str) -> None:
    """Refuses a compressed file, an archive, a table, an image or UTF-16, recognised by the first bytes."""
    if kind := kind_of_file(path):
        advice = "convert it to UTF-8 with iconv" if "UTF" in kind else "unpack it first"
        raise ValueError(f"it holds {kind}: {advice}")


def _load_json(path: str) -> Any:
    with _open_text(path) as file:
        return json.load(file)


def _open_text(path: str) -> io.TextIOWrapper:
    """Opens UTF-8 text, with or without a byte order mark; failed reads are retried (`files.reading`)."""
    _check_kind(path)
    return io.TextIOWrapper(open_for_reading(path), encoding="utf-8-sig")


def _iterate_json_list(path: str) -> Iterator[Any]:
    """Yields the elements of a JSON list of any size, with one element in memory at a time."""
    decoder = json.JSONDecoder()
    with _open_text(path) as file:
        buffer = file.read(_CHUNK).lstrip()
        if not buffer.startswith("["):
            raise ValueError("it does not start with '['")
        position = 1
        while True:
            match = _SEPARATORS.match(buffer, position)
            position = match.end() if match else position
            if buffer.startswith("]", position):
                return
            try:
                element, position = decoder.raw_decode(buffer, position)
            except json.JSONDecodeError as error:
                # The buffer ends within an element. Reading twice as much each time avoids quadratic time.
                more = file.read(max(_CHUNK, len(buffer) - position))
                if not more:
                    raise ValueError(f"truncated or damaged: {error.msg}") from error
                buffer, position = buffer[position:] + more, 0
                continue
            yield element


@contextlib.contextmanager
def _reading(path: str, form: str) -> Iterator[None]:
    """Turns the exceptions that a file of another form causes into one clear error."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"data: {path} cannot be read as {form}: {type(error).__name__}: {error}. Correct the path, or fetch it "
            "again."
        ) from error
