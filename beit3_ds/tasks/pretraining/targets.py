"""Adds the targets of masked data modeling to a batch: masked token ids and visual codes (paper section 2.2)."""

# B images with pixels, N patches per image.

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from beit3_ds.batch import PackedBatch

Encode = Callable[[Tensor, Tensor | None], Tensor]
"""Type of a function that encodes images as visual codes, (images, patches) int64. The first argument is the pixels in
`PackedBatch.targets[TOKENIZER_PIXELS]`, and the second is `PackedBatch.colors`. `CodeEncoder.encode` is such a
function."""
MASKED_TOKENS = "masked_tokens"
"""Key in `PackedBatch.targets`: positions of masked tokens in `PackedBatch.token_ids`, ascending, (masked tokens,)
int64."""
TARGET_IDS = "target_ids"
"""Key in `PackedBatch.targets`: original ids of the masked tokens, (masked tokens,) int64."""
TOKENIZER_PIXELS = "tokenizer_pixels"
"""Key in `PackedBatch.targets`: images for the visual tokenizer, (images, 3, size, size), uint8 or floats like
`PackedBatch.pixels`; absent on pipeline stages without heads."""
MASKED_PATCHES = "masked_patches"
"""Key in `PackedBatch.targets`: indices of masked patches in the flattened `PackedBatch.patch_mask`, ascending, (masked
patches,) int64."""
VISUAL_CODES = "visual_codes"
"""Key in `PackedBatch.targets`: codes of the masked patches, (masked patches,) int64, in the order of `MASKED_PATCHES`;
`prepare_batch` computes the codes on the device."""


def with_masks(
    batch: PackedBatch,
    *,
    masked_tokens: Tensor,
    target_ids: Tensor,
    tokenizer_pixels: Tensor | None = None,
    visual_codes: Tensor | None = None,
) -> PackedBatch:
    """Returns a batch with targets for its masked patches (`PackedBatch.patch_mask`) and masked tokens.

    The heads read only masked positions, in the order: patches of images, patches of pairs, tokens of captions, tokens
    of texts.

    Args:
        batch: batch without targets, in host memory.
        masked_tokens: positions of masked tokens, ascending, (masked tokens,) int64.
        target_ids: original ids of the masked tokens, (masked tokens,) int64.
        tokenizer_pixels: images for the visual tokenizer, (images, 3, size, size); None on pipeline stages without
            heads.
        visual_codes: codes of the masked patches, (masked patches,) int64; None if not computed yet.
    """
    assert masked_tokens.shape == target_ids.shape, "one target per masked token"
    masked_patches = batch.patch_mask.flatten().nonzero().squeeze(1)
    image, patch = batch.patch_mask.nonzero(as_tuple=True)
    rows = torch.cat([image * batch.image_length + 1 + patch, masked_tokens + batch.boundaries[1]])
    image_mim = int(batch.patch_mask[: batch.num_images].sum())
    pair_mim = len(image) - image_mim
    pair_mlm = int((masked_tokens < sum(batch.caption_lengths)).sum())
    text_mlm = len(masked_tokens) - pair_mlm
    targets = {
        MASKED_TOKENS: masked_tokens,
        TARGET_IDS: target_ids,
        MASKED_PATCHES: masked_patches,
        TOKENIZER_PIXELS: tokenizer_pixels,
        VISUAL_CODES: visual_codes,
    }
    return dataclasses.replace(
        batch,
        head_rows=rows,
        head_row_counts=(image_mim, pair_mim, pair_mlm, text_mlm),
        term_counts=(image_mim, text_mlm, pair_mim, pair_mlm),
        targets={name: value for name, value in targets.items() if value is not None},
    )


def with_visual_codes(batch: PackedBatch, codes_BN: Tensor) -> PackedBatch:
    """Returns the batch with the codes of its masked patches as targets.

    Args:
        batch: batch with `MASKED_PATCHES`.
        codes_BN: codes of all patches of the batch's images, (images, patches) int64.
    """
    assert codes_BN.shape == batch.patch_mask.shape, f"codes {tuple(codes_BN.shape)} for {batch.patch_mask.shape}"
    codes_M = codes_BN.flatten().index_select(0, batch.targets[MASKED_PATCHES])
    return batch.with_targets({**batch.targets, VISUAL_CODES: codes_M})


def prepare_batch(batch: PackedBatch, encode: Encode | None, device: torch.device) -> PackedBatch:
    """Moves a micro-batch to `device`; pipeline stages with heads also add the codes of the masked patches.

    Args:
        batch: the batch in host memory.
        encode: encodes images; None in a run on texts only, and on pipeline stages without heads.
        device: device of the model.
    """
    batch = batch.to(device)
    if TOKENIZER_PIXELS not in batch.targets:
        return batch  # this stage has no heads
    return with_visual_codes(batch, encode_images(batch, encode))


def encode_images(batch: PackedBatch, encode: Encode | None) -> Tensor:
    """Returns the visual codes of a batch's images, (images, patches) int64, on the device of the images.

    Args:
        batch: a batch with `TOKENIZER_PIXELS`.
        encode: encodes images; None in a run on texts only, where the result is empty.
    """
    pixels = batch.targets[TOKENIZER_PIXELS]
    if encode is None:
        assert not len(pixels), "images need a visual tokenizer"
        return torch.empty(batch.patch_mask.shape, dtype=torch.int64, device=pixels.device)
    return encode(pixels, batch.colors)
