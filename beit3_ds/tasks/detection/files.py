"""Reads object annotation files in COCO's format, which Objects365 also uses.

| member | keys that are read |
|---|---|
| `images` | `id`, `file_name` (path in the folder of images), `width`, `height` |
| `categories` | `id`, `name`; ids need not be contiguous |
| `annotations` | `id`, `image_id`, `category_id`, `bbox` (left, top, width, height), `iscrowd`, `segmentation` |

Files of a test split have no `annotations`. The members may come in any order. Parsing holds one entry in memory at a
time.
"""

# I images, N objects of a file.

import os
from array import array
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from beit3_ds.config import ConfigError
from beit3_ds.data.files.fingerprint import SourceFile
from beit3_ds.data.files.json_lists import iterate_json_lists, reading_as
from beit3_ds.data.files.records import BrokenRecordError, Skipped
from beit3_ds.data.images.annotated import describe_files
from beit3_ds.data.images.by_name import ImagesByName
from beit3_ds.data.images.decoding import MAX_PIXELS
from beit3_ds.printing import printable
from beit3_ds.tasks.detection.categories import Categories, is_identifier, read_categories
from beit3_ds.tasks.detection.segmentations import Segmentation, parse_segmentation
from beit3_ds.tasks.detection.views import Size

FORM = "an object with 'images' (id, file_name, width, height), 'categories' (id, name) and 'annotations'"
"""Expected form of an annotation file, for messages."""

_LARGEST = 2.0**53  # pixels; larger integers have no float
_TOLERANCE = 1.0  # pixels by which a box may exceed its image without a warning, because COCO rounds


class StoredObject(NamedTuple):
    """Holds an annotated object for training."""

    box: Tensor
    """Left, top, right and bottom in pixels, clipped to the image, (4,) float32."""
    label: int
    """Category label of the object."""
    segmentation: Segmentation | None
    """Mask of the object; None if masks are not read."""


class AnnotatedObjects:
    """Holds the images of an annotation file and their objects, in the order of the file.

    Training clips boxes to their image. It leaves out crowds, and objects whose clipped box has no area. If masks are
    read, training also leaves out objects without a mask. Images with too many pixels are treated as broken. `skipped`
    contains three kinds of counts: objects that are left out, by reason; boxes that exceed their image by more than 1
    pixel; images with too many pixels. An evaluation uses all annotations unchanged (`ground_truth`). All data are
    torch tensors, because data workers share tensors without copying. Each object takes about 45 bytes, plus 8 bytes
    per corner of a polygon.
    """

    def __init__(self, path: str, folder: str, collected: "_Collected") -> None:
        """Sorts the objects by image, and opens the folder of the images.

        Args:
            path: path of the annotation file.
            folder: folder of the images, or a pattern of tar files.
            collected: entries of the annotation file.

        Raises:
            ConfigError: if the folder does not exist, or an annotation has an unknown category.
        """
        self.path, self.images, self.skipped = path, ImagesByName(folder), collected.skipped
        assert collected.categories is not None, "every file lists its categories"
        self.categories, self.has_annotations = collected.categories, collected.has_annotations
        self.identifiers = torch.tensor(collected.image_ids, dtype=torch.int64)
        self._sizes = torch.tensor(collected.sizes, dtype=torch.int64).view(-1, 2)
        self._paths, self._path_ranges = _as_tensor(collected.paths), _ranges(collected.path_ends)
        images, labels = collected.find_images(), collected.find_labels()
        order = np.argsort(images, kind="stable")
        self._starts = torch.from_numpy(np.searchsorted(images[order], np.arange(len(self) + 1)))
        self._labels = torch.from_numpy(labels[order])
        self._boxes = torch.tensor(collected.boxes, dtype=torch.float32).view(-1, 4)[order]
        self._segments = _as_tensor(collected.segments)
        self._segment_ranges = _ranges(collected.segment_ends)[order] if collected.segment_ends else None
        self._num_parts = 0  # how many of the last parts of a path name an image; 0: all parts

    def check_images(self) -> None:
        """Checks that every image exists; lists each folder once and opens no image.

        If no image is found, all paths are shortened to their last two parts. If still none is found, they are
        shortened to the file name. Objects365 needs this: its annotation files contain paths like
        `images/v1/patch8/NAME.jpg`, but its archives contain `patch8/NAME.jpg`.

        Raises:
            ConfigError: if images are missing; the message contains the number of missing images and the first one.
            StorageError: if the file system fails.
        """
        for self._num_parts in (0, 2, 1):
            names = [self.file_name(index) for index in range(len(self))]
            missing = self.images.missing(names)
            if len(missing) < len(names):
                break
        if missing:
            wanted = set(missing)
            self._num_parts = 0 if len(missing) == len(names) else self._num_parts
            first = next(index for index, name in enumerate(names) if name in wanted)
            raise ConfigError(
                f"data: {printable(self.images.path)} lacks {len(wanted):,} of {len(names):,} images. The first is "
                f"that of {self.name(first)}. Correct 'images' in the config, fetch the missing images, or remove "
                "their entries."
            )

    def __len__(self) -> int:
        """Returns the number of images, including broken images."""
        return len(self.identifiers)

    @property
    def num_objects(self) -> int:
        """Returns the number of objects that training uses."""
        return len(self._labels)

    def files(self) -> Iterator[SourceFile]:
        """Yields the name, size in bytes and number of samples of the annotation file.

        Raises:
            ConfigError: if the file no longer exists.
        """
        ((num_bytes, _),) = describe_files([self.path])
        yield SourceFile(os.path.basename(self.path), num_bytes, len(self))

    def file_name(self, index: int) -> str:
        """Returns the path of an image relative to the folder of images."""
        start, stop = self._path_ranges[index].tolist()
        path = bytes(self._paths[start:stop].numpy()).decode("utf-8", "surrogatepass")
        return "/".join(path.split("/")[-self._num_parts :])

    def name(self, index: int) -> str:
        """Returns the annotation file, the image id and the image path of a sample, for messages."""
        return printable(f"{self.path}: image {int(self.identifiers[index])} ({self.file_name(index)})")

    def size(self, index: int) -> Size:
        """Returns the height and width of an image in pixels, according to the annotation file."""
        height, width = self._sizes[index].tolist()
        return height, width

    def image(self, index: int) -> Image.Image:
        """Decodes an image, with EXIF orientation applied, in RGB.

        Raises:
            BrokenRecordError: if the image cannot be read, or its size differs from the size in the annotation file.
        """
        try:
            image = self.images.image(self.file_name(index))
        except ValueError as error:
            raise BrokenRecordError(f"{self.name(index)}: broken image: {error}") from error
        if image.size[::-1] != self.size(index):
            height, width = self.size(index)
            raise BrokenRecordError(
                f"{self.name(index)}: the image has {image.width} x {image.height} pixels, but the file says {width} x "
                f"{height}, so its boxes do not fit"
            )
        return image

    def objects(self, index: int) -> list[StoredObject]:
        """Returns an image's objects that are used for training; the list may be empty."""
        found = []
        for place in range(int(self._starts[index]), int(self._starts[index + 1])):
            segmentation = None
            if self._segment_ranges is not None:
                start, stop = self._segment_ranges[place].tolist()
                segmentation = Segmentation.decode(bytes(self._segments[start:stop].numpy()))
            found.append(StoredObject(self._boxes[place], int(self._labels[place]), segmentation))
        return found

    def ground_truth(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Reads the file again and returns the entries of 'images' and of 'annotations', unchanged."""
        members: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
        with reading_as(self.path, FORM):
            for key, entry in iterate_json_lists(self.path, *members):
                members[key].append(entry)
        return members["images"], members["annotations"]


class _Collected:
    """Collects the entries of an annotation file during parsing."""

    def __init__(self, path: str, *, with_masks: bool) -> None:
        self._path, self._with_masks = path, with_masks
        self.categories: Categories | None = None
        self.has_annotations, self.skipped = False, dict[str, Skipped]()
        self.image_ids, self.sizes, self.paths, self.path_ends = array("q"), array("q"), bytearray(), array("q")
        self._places: dict[int, int] = {}
        self._annotation_ids, self._images, self._categories = array("q"), array("q"), array("q")
        self.boxes, self.segments, self.segment_ends = array("f"), bytearray(), array("q")
        self._seen = array("q")

    def add_image(self, entry: Any) -> None:
        identifier, path, size = entry["id"], entry["file_name"], (entry["height"], entry["width"])
        if not is_identifier(identifier) or not isinstance(path, str) or not all(map(_is_side, size)):
            raise ValueError(f"an image has no valid id, file_name, height and width: {str(entry)[:160]}")
        if self._places.setdefault(identifier, len(self._places)) != len(self.image_ids):
            raise ValueError(f"image id {identifier} occurs twice")
        if size[0] * size[1] > MAX_PIXELS:
            self._skip(f"image of more than {MAX_PIXELS:,} pixels, which counts as broken", f"image {identifier}")
        self.image_ids.append(identifier)
        self.sizes.extend(size)
        self.paths += path.encode("utf-8", "surrogatepass")
        self.path_ends.append(len(self.paths))

    def add_annotation(self, entry: Any) -> None:
        identifier, image, category = entry["id"], entry["image_id"], entry["category_id"]
        if not all(map(is_identifier, (identifier, image, category))):
            raise ValueError(f"an annotation has no valid id, image_id and category_id: {str(entry)[:160]}")
        if image not in self._places:
            raise ValueError(f"annotation {identifier} belongs to image {image}, which 'images' does not list")
        self._seen.append(identifier)
        place = self._places[image]
        size = self.sizes[2 * place], self.sizes[2 * place + 1]
        box = self._clip(entry["bbox"], size, identifier)
        segment = self._segment(entry, size, identifier) if self._with_masks else b""
        if entry.get("iscrowd"):
            self._skip("crowd, which training leaves out", f"annotation {identifier}")
        elif box is None:
            self._skip("box without area inside its image", f"annotation {identifier}")
        elif segment is None:
            self._skip("object without a mask", f"annotation {identifier}")
        else:
            self._annotation_ids.append(identifier)
            self._images.append(place)
            self._categories.append(category)
            self.boxes.extend(box)
            if self._with_masks:
                self.segments += segment
                self.segment_ends.append(len(self.segments))

    def check_ids(self) -> None:
        """Checks that annotation ids are unique, because the metric identifies annotations by id."""
        unique, counts = np.unique(np.array(self._seen, dtype=np.int64), return_counts=True)
        if len(repeated := unique[counts > 1]):
            raise ConfigError(
                f"detection: {self._path} has {len(repeated)} annotation ids that occur twice, such as {repeated[0]}. "
                "Give each annotation an id of its own."
            )

    def find_images(self) -> NDArray[np.int64]:
        """Returns the image index of each object, (N,) int64."""
        return np.array(self._images, dtype=np.int64)

    def find_labels(self) -> NDArray[np.int32]:
        """Returns the category label of each object, (N,) int32.

        Raises:
            ConfigError: if an object has a category that the file does not list.
        """
        assert self.categories is not None, "every file lists its categories"
        found = np.array(self._categories, dtype=np.int64)
        known = np.array([category.identifier for category in self.categories])
        labels = np.searchsorted(known, found).clip(max=len(known) - 1)
        if len(wrong := np.flatnonzero(known[labels] != found)):
            raise ConfigError(
                f"detection: {self._path}: annotation {self._annotation_ids[wrong[0]]} has category {found[wrong[0]]}, "
                f"which 'categories' does not list ({len(wrong):,} such annotations). Add the category, or remove them."
            )
        return labels.astype(np.int32)

    def _clip(self, value: Any, size: Size, identifier: int) -> tuple[float, ...] | None:
        """Returns left, top, right and bottom of a box clipped to its image; None if the clipped box has no area."""
        if not isinstance(value, list) or len(value) != 4 or not all(map(_is_number, value)):
            raise ValueError(f"annotation {identifier} has no box of four numbers: {str(value)[:80]}")
        left, top, width, height = value
        corners = left, top, left + width, top + height
        limits = size[1], size[0]
        if min(left, top) < -_TOLERANCE or any(corners[2 + i] > limits[i] + _TOLERANCE for i in range(2)):
            self._skip("box that exceeds its image; it is clipped", f"annotation {identifier}")
        clipped = tuple(min(max(corner, 0.0), float(limits[i % 2])) for i, corner in enumerate(corners))
        return clipped if clipped[2] > clipped[0] and clipped[3] > clipped[1] else None

    def _segment(self, entry: Any, size: Size, identifier: int) -> bytes | None:
        try:
            segmentation = parse_segmentation(entry.get("segmentation"), size)
        except ValueError as error:
            raise ValueError(f"annotation {identifier}: {error}") from error
        return None if segmentation is None else segmentation.encode()

    def _skip(self, reason: str, example: str) -> None:
        count, first = self.skipped.get(reason, (0, f"{self._path}: {example}"))
        self.skipped[reason] = Skipped(count + 1, first)

    def add_list(self, key: str, entry: Any) -> None:
        """Adds one entry of a list: of 'images' or of 'annotations'.

        Raises:
            ConfigError: if the entry is invalid; the message names the file and the id.
        """
        try:
            if key == "images":
                self.add_image(entry)
            else:
                self.has_annotations = True
                self.add_annotation(entry)
        except ValueError as error:
            raise ConfigError(
                f"detection: {printable(self._path)}: {printable(str(error))}. Correct the entry, or remove it."
            ) from error


def read_objects(path: str, folder: str, *, with_masks: bool) -> AnnotatedObjects:
    """Reads an annotation file of objects in COCO's format.

    Args:
        path: path of the annotation file.
        folder: folder of the images, or a pattern of tar files.
        with_masks: whether to read masks.

    Raises:
        ConfigError: if the file cannot be read, has another form, repeats an id, has an annotation with an unknown
            image or category, or has a mask that does not fit its image. The message names the file and the id.
    """
    collected, categories = _Collected(path, with_masks=with_masks), []
    is_postponed = False
    with reading_as(path, FORM):
        for key, entry in _entries(path):
            if key == "categories":
                categories.append(entry)
            elif key == "annotations" and not collected.image_ids:
                is_postponed = True  # annotations need image sizes, but the images come later in the file
            else:
                collected.add_list(key, entry)
        if not collected.image_ids:
            raise ValueError("'images' is empty")
        for key, entry in _entries(path) if is_postponed else ():
            if key == "annotations":
                collected.add_list(key, entry)
        collected.categories = read_categories(categories, path)
    collected.check_ids()
    return AnnotatedObjects(path, folder, collected)


def _entries(path: str) -> Iterator[tuple[str, Any]]:
    """Yields (list name, entry) for each entry of the lists 'images', 'categories' and 'annotations' in a JSON file.

    The list 'annotations' may be missing.
    """
    try:
        yield from iterate_json_lists(path, "images", "categories", "annotations")
    except KeyError as error:
        if error.args[0] != "annotations":
            raise


def _as_tensor(data: bytearray) -> Tensor:
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _ranges(ends: "array[int]") -> Tensor:
    stops = torch.tensor(ends, dtype=torch.int64)
    return torch.stack([torch.cat([stops.new_zeros(1), stops])[:-1], stops], 1)


def _is_side(value: object) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _is_number(value: object) -> bool:
    return (type(value) is int or type(value) is float) and abs(value) < _LARGEST  # false for NaN
