"""Reads and checks result files in COCO's format, from this or another program."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from beit3_ds.config import ConfigError
from beit3_ds.data.files.json_lists import iterate_json_list, reading_as
from beit3_ds.printing import printable
from beit3_ds.tasks.detection.categories import Categories
from beit3_ds.tasks.detection.segmentations import parse_segmentation
from beit3_ds.tasks.detection.views import Size

FORM = "COCO's result file, a list of objects with 'image_id', 'category_id', 'score' and 'bbox' or 'segmentation'"
"""Form of a result file, for messages."""

_LARGEST = 2.0**53
_MEMBERS = {"bbox": "bbox", "segm": "segmentation"}


def read_result_files(
    paths: Sequence[str], sizes: Mapping[int, Size], categories: Categories
) -> dict[str, list[dict[str, Any]]]:
    """Reads result files and returns their entries by kind, "bbox" or "segm".

    All entries of a file must have the same kinds of results: only boxes, only masks, or both. An entry with a box and
    a mask becomes two entries, because COCO's evaluation would otherwise take the size of the mask from the box.

    Args:
        paths: the files; at most one file may have boxes, and at most one file may have masks.
        sizes: height and width of each image in pixels, by image id.
        categories: the categories of the annotations.

    Raises:
        ConfigError: if a file cannot be read or is empty, if two files have boxes or two files have masks, or if an
            entry is not in COCO's format, has an unknown image or category, or has an invalid box or mask. The message
            names the file and, for an invalid entry, the entry.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    origins: dict[str, str] = {}
    for path in paths:
        for kind, entries in _read(path, sizes, categories).items():
            if kind in found:
                raise ConfigError(
                    f"results: {printable(origins[kind])} and {printable(path)} have '{_MEMBERS[kind]}'. Name one of "
                    "the two."
                )
            found[kind], origins[kind] = entries, path
    return found


def _read(path: str, sizes: Mapping[int, Size], categories: Categories) -> dict[str, list[dict[str, Any]]]:
    """Returns the checked entries of one file by kind."""
    checks: Mapping[str, Callable[[Any, Size], Any]] = {"bbox": _check_box, "segm": _check_mask}
    found: dict[str, list[dict[str, Any]]] = {}
    with reading_as(path, FORM):
        for number, entry in enumerate(iterate_json_list(path), 1):
            try:
                head = _check_head(entry, sizes, categories)
                kinds = [kind for kind, member in _MEMBERS.items() if member in entry]
                if not found:
                    found = {kind: [] for kind in kinds}
                if not kinds or list(found) != kinds:
                    wanted = " and ".join(f"'{_MEMBERS[kind]}'" for kind in found) or "'bbox' or 'segmentation'"
                    raise ValueError(f"it must have {wanted}, as the entries before it: {str(entry)[:80]}")
                for kind in kinds:
                    member = _MEMBERS[kind]
                    found[kind].append(head | {member: checks[kind](entry[member], sizes[head["image_id"]])})
            except ValueError as error:
                raise ConfigError(_broken(path, number, entry, error)) from error
    if not found:
        raise ConfigError(f"results: {printable(path)} is an empty list, so nothing can be scored. Name another file.")
    return found


def _broken(path: str, number: int, entry: Any, error: ValueError) -> str:
    image = entry.get("image_id") if isinstance(entry, dict) else None
    where = f"entry {number}" + ("" if image is None else f" (image {str(image)[:40]})")
    return f"results: {printable(path)}: {where}: {printable(str(error))}. Correct the file, or name another one."


def _check_head(entry: Any, sizes: Mapping[int, Size], categories: Categories) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ValueError(f"it is no object: {str(entry)[:80]}")
    image, category, score = (entry.get(name) for name in ("image_id", "category_id", "score"))
    if type(image) is not int or type(category) is not int:
        raise ValueError(f"it has no whole numbers 'image_id' and 'category_id': {str(entry)[:80]}")
    if image not in sizes:
        raise ValueError(f"image {image} is none of the {len(sizes):,} images of the split")
    if category not in categories.labels:
        raise ValueError(f"category {category} is none of the {len(categories)} categories of {categories.where}")
    if not _is_number(score):
        raise ValueError(f"'score' is no finite number: {str(score)[:40]}")
    return {"image_id": image, "category_id": category, "score": score}


def _check_box(box: Any, _size: Size) -> list[float]:
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise ValueError(f"'bbox' is no list of four finite numbers: {str(box)[:80]}")
    if box[2] < 0 or box[3] < 0:
        raise ValueError(f"'bbox' has a negative width or height: {box}")
    return box


def _check_mask(mask: Any, size: Size) -> dict[str, Any]:
    if not isinstance(mask, dict):
        raise ValueError(f"'segmentation' is no object with 'size' and 'counts': {str(mask)[:60]}")
    segmentation = parse_segmentation(mask, size)
    assert segmentation is not None, "run lengths are never left out"
    return {"size": list(size), "counts": segmentation.counts.decode("ascii")}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _LARGEST
