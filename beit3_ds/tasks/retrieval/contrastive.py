"""Computes the contrastive loss over all images and texts of a step (Radford et al., 2021, arXiv:2103.00020)."""

# N pairs of a step, B queries of a block, D hidden.

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from beit3_ds.model import StepFeatures
from beit3_ds.tasks.retrieval.head import IMAGE_FEATURES, SCALE, TEXT_FEATURES

IMAGE_IDS = "image_id"
"""Key in `PackedBatch.targets` and `StepFeatures.rows`: hash of each image, (images,) int64; equal for equal images."""
TEXT_IDS = "text_id"
"""Key in `PackedBatch.targets` and `StepFeatures.rows`: hash of each caption, (captions,) int64; equal for equal
captions."""

_BLOCK_ELEMENTS = 1 << 20
"""Maximum number of scores computed at a time."""


def contrastive_sums(features: StepFeatures, *, mask_duplicates: bool) -> Tensor:
    """Returns two losses and two counts, each summed over all pairs of a step, (4,) float32.

    The first is the cross entropy of finding each image's caption among all captions. The second is the cross entropy
    of finding each caption's image among all images. The third is the number of images whose own caption has the
    highest score of all captions. The fourth is the number of captions whose own image has the highest score of all
    images. Scores are computed in blocks of rows and recomputed in the backward pass, so memory grows linearly with the
    number of pairs.

    Args:
        features: normalised features of images and captions, and the scale of scores. Image i belongs to caption i.
        mask_duplicates: whether two pairs with the same image or the same caption do not count as negatives of each
            other. This affects the losses and the counts.
    """
    image_ND, text_ND = features.rows[IMAGE_FEATURES], features.rows[TEXT_FEATURES]
    ids_N2 = torch.stack([features.rows[IMAGE_IDS], features.rows[TEXT_IDS]], 1) if mask_duplicates else None
    scale = features.shared[SCALE]
    to_text, found_texts = _sum_blocks(image_ND, text_ND, ids_N2, scale)
    to_image, found_images = _sum_blocks(text_ND, image_ND, ids_N2, scale)
    return torch.stack([to_text, to_image, found_texts, found_images])


def _sum_blocks(query_ND: Tensor, candidate_ND: Tensor, ids_N2: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the summed cross entropy, and the number of queries i for which candidate i has the highest score."""
    rows = max(1, _BLOCK_ELEMENTS // max(1, len(candidate_ND)))
    loss, found = 0 * scale.sum() + 0 * query_ND.sum() + 0 * candidate_ND.sum(), scale.new_zeros(())
    for start in range(0, len(query_ND), rows):
        arguments: tuple[Any, ...] = (query_ND[start : start + rows], candidate_ND, ids_N2, scale, start)
        # There are no random draws and no shapes that depend on values, so the recomputation needs no check.
        block_loss, block_found = checkpoint(
            _sum_block, *arguments, use_reentrant=False, preserve_rng_state=False, determinism_check="none"
        )
        loss, found = loss + block_loss, found + block_found
    return loss, found


def _sum_block(
    query_BD: Tensor, candidate_ND: Tensor, ids_N2: Tensor | None, scale: Tensor, start: int
) -> tuple[Tensor, Tensor]:
    score_BN = scale * (query_BD @ candidate_ND.t())
    partner_B = torch.arange(start, start + len(query_BD), device=query_BD.device)
    if ids_N2 is not None:
        equal_BN = (ids_N2[partner_B, None] == ids_N2).any(2)
        equal_BN[torch.arange(len(query_BD), device=query_BD.device), partner_B] = False
        score_BN = score_BN.masked_fill(equal_BN, -torch.inf)
    found = (score_BN.argmax(1) == partner_B).sum()
    return F.cross_entropy(score_BN, partner_B, reduction="sum"), found.float()
