"""Visual targets: the frozen tokenizer's codes of each micro-batch, made online (paper section 2.2)."""

import torch

from beit3_ds.batch import PackedBatch
from beit3_ds.tokenizers.visual import VisualTokenizer


def prepare_batch(batch: PackedBatch, visual_tokenizer: VisualTokenizer | None, device: torch.device) -> PackedBatch:
    """Moves a micro-batch to `device` and fills in the codes of its masked patches.

    Args:
        batch: as it was read.
        visual_tokenizer: None on stages of a pipeline without heads, which need no codes.
        device: of the model.
    """
    batch = batch.to(device)
    if visual_tokenizer is None:
        return batch
    assert batch.tokenizer_pixels is not None, "the stage with the heads reads the tokenizer's view"
    return batch.with_visual_codes(visual_tokenizer.encode(batch.tokenizer_pixels))
