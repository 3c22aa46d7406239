"""Visual targets: the frozen tokenizer's codes of each micro-batch, made online (paper section 2.2)."""

import torch

from beit3_ds.batch import PackedBatch
from beit3_ds.tokenizers.visual import VisualTokenizer


def prepare_batch(batch: PackedBatch, visual_tokenizer: VisualTokenizer, device: torch.device) -> PackedBatch:
    """Moves a micro-batch to `device` and fills in the codes of its masked patches."""
    batch = batch.to(device)
    return batch.with_visual_codes(visual_tokenizer.encode(batch.tokenizer_pixels))
