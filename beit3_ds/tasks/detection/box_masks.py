"""Resamples the masks of objects from one box to another."""

# N objects, H and W sides of a mask, M side of a stored mask, S side of a result.

import torch
import torch.nn.functional as F
from torch import Tensor

MASK_SIDE = 112
"""Cells per side of a stored mask. The loss compares masks at the coarser resolution of 28 x 28 cells."""


@torch.no_grad()
def masks_in_boxes(masks_NHW: Tensor, frames_N4: Tensor, boxes_N4: Tensor, side: int) -> Tensor:
    """Resamples masks to a grid of cells inside boxes, (N, side, side) bool.

    The mask is interpolated bilinearly at the centre of each cell. A cell is true if the value is at least 0.5. A cell
    is false if its centre is outside the mask's area.

    Args:
        masks_NHW: masks of 0 and 1, (N, H, W).
        frames_N4: left, top, right and bottom of each mask's area, (N, 4).
        boxes_N4: left, top, right and bottom of each box, (N, 4).
        side: cells per side of the result.
    """
    centres_S = (torch.arange(side, device=boxes_N4.device) + 0.5) / side
    extents_N2 = boxes_N4[:, 2:] - boxes_N4[:, :2]
    points_NS2 = boxes_N4[:, None, :2] + centres_S[None, :, None] * extents_N2[:, None]
    sides_N2 = (frames_N4[:, 2:] - frames_N4[:, :2]).clamp(min=1e-6)
    grid_NS2 = 2 * (points_NS2 - frames_N4[:, None, :2]) / sides_N2[:, None] - 1
    x_NSS = grid_NS2[:, None, :, 0].expand(-1, side, -1)
    y_NSS = grid_NS2[:, :, None, 1].expand(-1, -1, side)
    seen_N1SS = F.grid_sample(
        masks_NHW[:, None].to(boxes_N4.dtype), torch.stack([x_NSS, y_NSS], 3), padding_mode="zeros", align_corners=False
    )
    return seen_N1SS[:, 0] >= 0.5


def tight_box(mask_MM: Tensor, box_4: Tensor) -> Tensor:
    """Returns the smallest box around the true cells of a mask, (4,).

    Args:
        mask_MM: a mask with at least one true cell, (side, side) bool.
        box_4: left, top, right and bottom of the area that the mask covers.
    """
    rows, columns = mask_MM.any(1).nonzero()[:, 0], mask_MM.any(0).nonzero()[:, 0]
    cell_2 = (box_4[2:] - box_4[:2]) / torch.tensor(mask_MM.shape[::-1])
    first = torch.stack([columns[0], rows[0]])
    last = torch.stack([columns[-1], rows[-1]]) + 1
    return torch.cat([box_4[:2] + first * cell_2, box_4[:2] + last * cell_2])
