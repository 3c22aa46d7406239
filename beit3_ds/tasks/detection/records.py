"""Converts detections to entries of COCO's result files. Resamples a box's mask to a mask of the whole image."""

# N detections, S side of a predicted mask.

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_ds.tasks.detection.detections import Detections
from beit3_ds.tasks.detection.segmentations import import_masks
from beit3_ds.tasks.detection.views import Size

_HALF = 0.5


class DetectionRecord(NamedTuple):
    """Holds the detections of one image as Python values, in descending order of the score."""

    size: Size
    """Height and width of the image in pixels."""
    boxes: list[list[float]]
    """Left, top, width and height of each detection in pixels, as in COCO's files."""
    scores: list[float]
    """Score of each detection, from 0 to 1."""
    labels: list[int]
    """Category label of each detection."""
    counts: list[str] | None
    """Mask of each detection as compressed run lengths in COCO's format; None without masks."""

    def to_json(self) -> str:
        """Returns the record as a JSON list."""
        return json.dumps(self)

    @classmethod
    def from_json(cls, text: str) -> "DetectionRecord":
        """Returns the record from the JSON text that `to_json` returned."""
        size, *rest = json.loads(text)
        return cls((size[0], size[1]), *rest)

    def __len__(self) -> int:
        """Returns the number of detections."""
        return len(self.scores)

    def entries(self, image_id: int, category_ids: Sequence[int], kind: str) -> list[dict[str, Any]]:
        """Returns the detections as entries of a COCO result file.

        An entry has either a box or a mask. For an entry with box and mask, COCO's evaluation would compute the
        object's size from the box instead of the mask.

        Args:
            image_id: id of the image.
            category_ids: category id by label.
            kind: "bbox" or "segm".
        """
        heads = [
            {"image_id": image_id, "category_id": category_ids[label], "score": score}
            for label, score in zip(self.labels, self.scores, strict=True)
        ]
        if kind == "bbox":
            return [head | {"bbox": box} for head, box in zip(heads, self.boxes, strict=True)]
        assert self.counts is not None, "the task predicts no masks"
        masks = [{"size": list(self.size), "counts": counts} for counts in self.counts]
        return [head | {"segmentation": mask} for head, mask in zip(heads, masks, strict=True)]


def make_record(detections: Detections, size: Size) -> DetectionRecord:
    """Converts the detections of one image to Python values.

    Args:
        detections: detections of the image, as tensors.
        size: height and width of the image in pixels.
    """
    boxes_N4 = detections.boxes.cpu()
    corners, extents = boxes_N4[:, :2], boxes_N4[:, 2:] - boxes_N4[:, :2]
    counts = None
    if detections.masks is not None:
        masks = detections.masks.float().cpu()
        counts = [_encode(whole_mask(mask, box, size)) for mask, box in zip(masks, boxes_N4, strict=True)]
    return DetectionRecord(
        size=size,
        boxes=torch.cat([corners, extents], 1).double().tolist(),
        scores=detections.scores.double().tolist(),
        labels=detections.labels.tolist(),
        counts=counts,
    )


def whole_mask(mask_SS: Tensor, box_4: Tensor, size: Size) -> Tensor:
    """Resamples a mask inside a box to the whole image, (height, width) bool.

    The probability is interpolated bilinearly at the centre of each pixel in the box. A pixel is true if this value is
    at least 0.5. Pixels outside the box are false.

    Args:
        mask_SS: probability that each cell of the box belongs to the object, (S, S).
        box_4: left, top, right and bottom of the box in pixels, inside the image.
        size: height and width of the image in pixels.
    """
    height, width = size
    left, top, right, bottom = box_4.tolist()
    columns = torch.arange(max(0, math.floor(left)), min(width, math.ceil(right)))
    rows = torch.arange(max(0, math.floor(top)), min(height, math.ceil(bottom)))
    whole = torch.zeros(height, width, dtype=torch.bool)
    if not len(columns) or not len(rows) or right <= left or bottom <= top:
        return whole
    x = 2 * (columns + 0.5 - left) / (right - left) - 1
    y = 2 * (rows + 0.5 - top) / (bottom - top) - 1
    grid = torch.stack([x[None].expand(len(y), -1), y[:, None].expand(-1, len(x))], 2)
    seen = F.grid_sample(mask_SS[None, None], grid[None], padding_mode="border", align_corners=False)[0, 0]
    whole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = seen >= _HALF
    return whole


def decode_mask(counts: str, size: Size) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Decodes a mask from compressed run lengths in COCO's format, (height, width) bool."""
    mask: Mapping[str, Any] = {"size": list(size), "counts": counts.encode("ascii")}
    decoded = import_masks().decode(mask).astype(bool)
    return np.ascontiguousarray(decoded)


def _encode(whole: Tensor) -> str:
    encoded = import_masks().encode(np.asfortranarray(whole.numpy().astype(np.uint8)))
    counts: bytes = encoded["counts"]
    return counts.decode("ascii")
