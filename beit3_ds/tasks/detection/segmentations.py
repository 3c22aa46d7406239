"""Checks and draws the segmentations of COCO's files: polygons and run-length encoded masks."""

# M side of a stored mask.

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from beit3_ds.config import ConfigError
from beit3_ds.tasks.detection.box_masks import MASK_SIDE, masks_in_boxes

_MIN_COORDINATES = 6  # of a polygon: three corners
_LARGEST = 2.0**24  # pixels; larger coordinates are invalid


class Segmentation(NamedTuple):
    """Holds the mask of an object, either as polygons or as run lengths of a mask of the whole image."""

    rings: Sequence[NDArray[np.float32]] = ()
    """Corners (x, y) of each polygon in pixels, (corners, 2); the object is the union of the polygons."""
    counts: bytes = b""
    """Compressed run lengths of a mask of the whole image; empty for polygons."""

    def encode(self) -> bytes:
        """Returns the segmentation as bytes, for `decode`."""
        if self.counts:
            return b"R" + self.counts
        lengths = np.array([len(self.rings), *map(len, self.rings)], dtype="<i4")
        corners = [np.asarray(ring, dtype="<f4").tobytes() for ring in self.rings]
        return b"P" + lengths.tobytes() + b"".join(corners)

    @classmethod
    def decode(cls, data: bytes) -> "Segmentation":
        """Returns the segmentation from the bytes that `encode` returned."""
        if data[:1] == b"R":
            return cls(counts=data[1:])
        (num_rings,) = np.frombuffer(data, "<i4", 1, 1)
        lengths = np.frombuffer(data, "<i4", num_rings, 5)
        corners = np.frombuffer(data, "<f4", offset=5 + 4 * num_rings).reshape(-1, 2)
        return cls(rings=np.split(corners, np.cumsum(lengths)[:-1]))


def import_masks() -> Any:
    """Returns the `mask` module of faster-coco-eval.

    Raises:
        ConfigError: if faster-coco-eval is not installed; the message says how to install it.
    """
    try:
        from faster_coco_eval import mask
    except ImportError as error:
        raise ConfigError(
            f"detection needs faster-coco-eval, which decodes COCO's masks and computes AP ({error}). Install it with "
            "`pip install '.[detection]'`."
        ) from None
    return mask


def parse_segmentation(value: object, size: tuple[int, int]) -> Segmentation | None:
    """Checks and converts the member 'segmentation' of an annotation.

    Polygons with fewer than three corners are ignored; COCO contains some.

    Args:
        value: a list of polygons, each a flat list of coordinates, or a dict with 'size' and 'counts'.
        size: height and width of the annotation's image in pixels.

    Returns:
        The segmentation; None if no polygon remains.

    Raises:
        ValueError: if the value has another form, or the run lengths do not fit the image.
    """
    if isinstance(value, dict):
        return Segmentation(counts=_parse_run_lengths(value, size))
    if not isinstance(value, list):
        raise ValueError(f"'segmentation' is neither a list of polygons nor run lengths: {str(value)[:60]}")
    rings = [ring for polygon in value if (ring := _parse_polygon(polygon)) is not None]
    return Segmentation(rings=rings) if rings else None


def _parse_polygon(polygon: object) -> NDArray[np.float32] | None:
    if not isinstance(polygon, list) or len(polygon) % 2:
        raise ValueError(f"a polygon is no list of x and y: {str(polygon)[:60]}")
    corners = np.asarray(polygon, dtype=np.float32)
    if corners.ndim != 1 or not (np.abs(corners) < _LARGEST).all():
        raise ValueError(f"a polygon has coordinates that are no pixels: {str(polygon)[:60]}")
    return corners.reshape(-1, 2) if len(corners) >= _MIN_COORDINATES else None


def _parse_run_lengths(value: dict[str, Any], size: tuple[int, int]) -> bytes:
    stated, counts = value.get("size"), value.get("counts")
    if stated != list(size):
        raise ValueError(f"the mask has size {stated} (height, width), its image {list(size)}")
    if isinstance(counts, str):
        encoded = {"counts": counts.encode("ascii", "replace")}
        if (total := _count_pixels(encoded["counts"])) != size[0] * size[1]:
            raise ValueError(f"run lengths add up to {total}, but the image has {size[0]} x {size[1]} pixels")
    elif isinstance(counts, list) and all(type(count) is int and count >= 0 for count in counts):
        if sum(counts) != size[0] * size[1]:
            raise ValueError(f"run lengths add up to {sum(counts)}, but the image has {size[0]} x {size[1]} pixels")
        encoded = import_masks().frPyObjects({"size": list(size), "counts": counts}, *size)
    else:
        raise ValueError(f"'counts' are no run lengths: {str(counts)[:60]}")
    return bytes(encoded["counts"])


def _count_pixels(counts: bytes) -> int:
    """Returns the sum of compressed run lengths in COCO's format, which has one number per run.

    A number is written in groups of five bits, the lowest group first. Each group is stored in one character. The
    character's code minus 48 has the group in bits 0 to 4, and has bit 5 set if another group follows. The groups of a
    number form a signed integer in two's complement. The first three numbers are run lengths. Each later number is the
    difference from the run length two runs before.

    Raises:
        ValueError: if a character is invalid, if the last number is cut off, or if a run length is negative.
    """
    lengths, value, shift = [0, 0], 0, 0
    for character in counts:
        group = character - 48
        if not 0 <= group < 64:
            raise ValueError(f"'counts' are no run lengths: they have the character {chr(character)!r}")
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        lengths.append(value + (lengths[-2] if len(lengths) > 4 else 0))
        if lengths[-1] < 0:
            raise ValueError("'counts' have a negative run length")
        value, shift = 0, 0
    if shift:
        raise ValueError("'counts' are cut off")
    return sum(lengths)


def draw_in_box(segmentation: Segmentation, size: tuple[int, int], box_4: Tensor) -> Tensor:
    """Returns the mask of an object inside a box, (MASK_SIDE, MASK_SIDE) bool.

    Polygons are drawn directly at the resolution of the box, without a mask of the whole image.

    Args:
        segmentation: segmentation of the object.
        size: height and width of the image in pixels.
        box_4: left, top, right and bottom of the box in pixels of the image; the area must be positive.

    Raises:
        ValueError: if run lengths are damaged.
    """
    masks = import_masks()
    if segmentation.counts:
        mask = masks.decode({"size": list(size), "counts": segmentation.counts})
        whole = torch.from_numpy(np.ascontiguousarray(mask))[None]
        frame = torch.tensor([[0.0, 0.0, size[1], size[0]]])
        return masks_in_boxes(whole, frame, box_4[None].float(), MASK_SIDE)[0]
    left, top, right, bottom = box_4.tolist()
    scale = np.array([MASK_SIDE / (right - left), MASK_SIDE / (bottom - top)])
    scaled = ((ring.astype(np.float64) - (left, top)) * scale for ring in segmentation.rings)
    rings = [
        clipped.ravel().tolist() for ring in scaled if len(clipped := _clip_to_cells(ring)) >= _MIN_COORDINATES // 2
    ]
    if not rings:
        return torch.zeros(MASK_SIDE, MASK_SIDE, dtype=torch.bool)
    drawn = masks.merge(masks.frPyObjects(rings, MASK_SIDE, MASK_SIDE))
    return torch.from_numpy(np.ascontiguousarray(masks.decode(drawn))).bool()


def _clip_to_cells(ring: NDArray[np.float64]) -> NDArray[np.float64]:
    """Clips a polygon to the grid of MASK_SIDE x MASK_SIDE cells (Sutherland and Hodgman, 1974).

    Clipping reduces the time to draw the polygon. This time is proportional to the length of the polygon's outline,
    which can be much longer than the outline of the grid.
    """
    for axis in range(2):
        for sign, bound in ((1, 0.0), (-1, MASK_SIDE)):
            if len(ring):
                ring = _clip_to_half(ring, sign * (ring[:, axis] - bound))
    return ring


def _clip_to_half(ring: NDArray[np.float64], depths: NDArray[np.float64]) -> NDArray[np.float64]:
    """Clips a polygon at a straight edge.

    Removes the corners with negative depth, and adds a corner at each point where the polygon's outline crosses the
    edge.

    Args:
        ring: corners (x, y), (corners, 2).
        depths: signed distance of each corner from the edge, (corners,); negative outside.
    """
    following, next_depths = np.roll(ring, -1, axis=0), np.roll(depths, -1)
    crosses = (depths >= 0) != (next_depths >= 0)
    shares = np.divide(depths, depths - next_depths, out=np.zeros_like(depths), where=crosses)
    crossings = ring + shares[:, None] * (following - ring)
    return np.stack([crossings, following], 1)[np.stack([crosses, next_depths >= 0], 1)]


def whole_segmentation(segmentation: Segmentation, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Returns the mask of an object in its image, (height, width) bool, drawn like in COCO's evaluation.

    Args:
        segmentation: segmentation of the object.
        size: height and width of the image in pixels.
    """
    masks = import_masks()
    if segmentation.counts:
        encoded = {"size": list(size), "counts": segmentation.counts}
    else:
        encoded = masks.merge(masks.frPyObjects([ring.ravel().tolist() for ring in segmentation.rings], *size))
    return np.ascontiguousarray(masks.decode(encoded)).astype(bool)
