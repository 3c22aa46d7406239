"""Reads the annotation files of public image-text corpora.

The readers follow the published descriptions of the formats. They were never tested on the official files.

| corpus | annotation file | image of a row |
|---|---|---|
| COCO Captions | `captions_*.json` | `file_name` of the image whose `id` is the row's `image_id` |
| Visual Genome | `region_descriptions.json` and `image_data.json` | end of the image's URL: `VG_100K/2.jpg` |
| SBU Captions | `*_captions.txt`, one caption per line, or JSON with `captions` | file named by the row number |
| Conceptual Captions | TSV: caption, URL; Conceptual 12M: URL, caption | file named by the row number |

Rows are numbered from 0: `7.jpg`, `00007.png` and `00000/000000007.jpg` are images of row 7.

In COCO Captions and Visual Genome, a sample with a missing image is a broken record. In SBU Captions and Conceptual
Captions, a row with a missing image is skipped and counted, because downloads of these corpora are never complete.
"""

from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from beit3_ds.data.files.json_lists import iterate_json_list, read_json_members, reading_as
from beit3_ds.data.files.kinds import check_is_text
from beit3_ds.data.files.lines import iterate_lines
from beit3_ds.data.files.reading import open_for_reading
from beit3_ds.data.images.annotated import NO_IMAGE, AnnotatedImages, CollectedAnnotations
from beit3_ds.data.images.compact_strings import CompactStrings
from beit3_ds.data.images.folder import list_images, open_folder

_MAX_ROW_BYTES = 1 << 20  # a caption has fewer; a longer row is cut and is then a broken record
_JSON_LINES = (".jsonl", ".ndjson", ".jsonlines", ".ldjson")


def read_coco_captions(annotations: str, folder: str) -> AnnotatedImages:
    """Reads COCO Captions (Chen et al., 2015, arXiv:1504.00325): one sample per annotation, in the order of the file.

    Args:
        annotations: path of the annotation file. It holds a JSON object with `images` (`id`, `file_name`) and
            `annotations` (`image_id`, `caption`).
        folder: folder that contains the images, such as `train2014`.

    Raises:
        ConfigError: if the file cannot be read or does not have this form.
    """
    samples = CollectedAnnotations(annotations, folder)
    with reading_as(annotations, "an object with 'images' (id, file_name) and 'annotations' (image_id, caption)"):
        content = read_json_members(annotations, "images", "annotations")
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
    """Reads Visual Genome (Krishna et al., 2017, arXiv:1602.07332): one sample per region of an image.

    The caption of a sample is the region's phrase.

    Args:
        region_descriptions: JSON list of images, each with `id` and `regions`; each region has a `phrase`.
        image_data: JSON list of images, each with `image_id` and `url`.
        folder: folder that contains `VG_100K` and `VG_100K_2`.

    Raises:
        ConfigError: if a file cannot be read or does not have this form.
    """
    samples = CollectedAnnotations(region_descriptions, folder)
    with reading_as(image_data, "a list of objects with 'image_id' and 'url'"):
        numbers = {
            image["image_id"]: samples.add_image("/".join(image["url"].split("/")[-2:]))
            for image in iterate_json_list(image_data)
        }
    with reading_as(region_descriptions, "a list of objects with 'id' and 'regions' (phrase)"):
        for image in iterate_json_list(region_descriptions):
            for region in image["regions"]:
                samples.add_sample(numbers.get(image["id"], NO_IMAGE), region.get("phrase"))
    return samples


def read_sbu_captions(captions: str, folder: str) -> AnnotatedImages:
    """Reads SBU Captions (Ordonez et al., 2011): one caption per row. The corpus's list of URLs is not needed.

    Args:
        captions: text file with one caption per line, or `.json` file with an object that has the list `captions`. Each
            line or list entry is a row.
        folder: folder of images whose file names are row numbers, counted from 0; subfolders are searched too.

    Raises:
        ConfigError: if a file cannot be read or does not have this form, or the folder has no images.
    """
    samples = CollectedAnnotations(captions, folder)
    with reading_as(captions, "one caption per line, or a JSON object with the list 'captions'"):
        rows = (
            read_json_members(captions, "captions")["captions"]
            if captions.lower().endswith(".json")
            else _lines(captions)
        )
        _add_rows(samples, rows)
    return samples


def read_conceptual_captions(
    table: str, folder: str, columns: Literal["caption_url", "url_caption"]
) -> AnnotatedImages:
    """Reads Conceptual Captions (Sharma et al., 2018) or Conceptual 12M (Changpinyo et al., 2021, arXiv:2102.08981).

    Args:
        table: tab-separated values without a header line.
        folder: folder of images whose file names are row numbers; subfolders are searched too.
        columns: order of the columns: `caption_url` for Conceptual Captions, `url_caption` for Conceptual 12M.

    Raises:
        ConfigError: if the file cannot be read, if the columns are in the other order, or if the folder has no images.
    """
    samples = CollectedAnnotations(table, folder)
    with reading_as(table, f"lines of {columns.replace('_', ', tab, ')}"):
        _add_rows(samples, _caption_column(table, columns.split("_").index("caption")))
    return samples


def _add_rows(samples: CollectedAnnotations, captions: Iterable[object]) -> None:
    """Adds a sample for each row that has both an image and a caption; skips and counts all other rows.

    The images are in the image folder of `samples`. The file name of an image is the number of its row, from 0. An
    image without a row is also skipped and counted. If several images have the number of one row, for example with
    different extensions, all except the first are skipped and counted.

    Args:
        samples: collection that receives the samples.
        captions: caption of each row; None if the row has no caption.
    """
    paths, skipped = list_images(open_folder(samples.images.path))
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
    """Finds the rows of the caption table that have an image. The file name of an image is the number of its row.

    Skips an image if its name is not a number or its row already has an image. `samples` counts the skipped images.

    Returns:
        The numbers of the rows in ascending order, and for each of these rows, the index of its image in `paths`.
    """
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
                f"column {2 - caption_column} of the first line, {columns[1 - caption_column]!r}, is not a URL"
            )
        yield columns[caption_column]


def _lines(path: str) -> Iterator[str]:
    if path.lower().endswith(_JSON_LINES):
        raise ValueError("it is JSON with one object per line, not one caption per line")
    check_is_text(path)
    # Reads bytes: only a newline ends a row, no other separator of Unicode, and one bad caption breaks one row.
    with open_for_reading(path) as file:
        for line in iterate_lines(file, _MAX_ROW_BYTES):
            yield line.rstrip(b"\r\n").decode("utf-8", "surrogateescape")
