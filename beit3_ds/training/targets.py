"""Visual targets: the frozen tokenizer's codes of each micro-batch, made online (paper section 2.2)."""

import torch
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.tokenizers.visual import VisualTokenizer


def prepare_batch(batch: PackedBatch, visual_tokenizer: VisualTokenizer | None, device: torch.device) -> PackedBatch:
    """Moves a micro-batch to `device` and fills in the codes of its masked patches.

    Args:
        batch: the batch as it was read.
        visual_tokenizer: None on stages of a pipeline without heads, which need no codes, and in a run without images.
        device: device of the model.
    """
    batch = batch.to(device)
    if batch.tokenizer_pixels is None:
        return batch  # this stage has no heads
    return batch.with_visual_codes(encode_images(batch, visual_tokenizer))


def encode_images(batch: PackedBatch, visual_tokenizer: VisualTokenizer | None) -> Tensor:
    """Returns the codes of a batch's images, (B, N) int64, on the device of its pixels.

    Args:
        batch: a batch with the tokenizer's view.
        visual_tokenizer: None in a run without images, whose batches have none.
    """
    assert batch.tokenizer_pixels is not None, "the stage with the heads reads the tokenizer's view"
    if visual_tokenizer is None:
        assert not len(batch.tokenizer_pixels), "images need a visual tokenizer"
        return torch.empty(batch.patch_mask.shape, dtype=torch.int64, device=batch.tokenizer_pixels.device)
    return visual_tokenizer.encode(batch.tokenizer_pixels)
