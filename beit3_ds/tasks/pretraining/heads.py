"""Implements the two heads of masked modeling (paper section 2.2)."""

# D hidden, M rows at masked positions.

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ModelConfig
from beit3_ds.model import Head
from beit3_ds.parallel import TensorParallel, VocabParallelHead
from beit3_ds.tasks.pretraining.targets import TARGET_IDS, VISUAL_CODES


class Logits(NamedTuple):
    """Logits at the masked positions of one micro-batch."""

    visual: Tensor
    """Logits of visual tokens, (masked patches, visual vocabulary)."""
    text: Tensor
    """Logits of text tokens, (masked tokens, text vocabulary)."""


class MaskedModelingHeads(Head):
    """Applies the MIM head and the MLM head; both vocabularies are split over the tensor-parallel group."""

    def __init__(self, config: ModelConfig, tensor: TensorParallel) -> None:
        super().__init__()
        self.mim = VocabParallelHead(config.hidden_size, config.visual_vocab_size, None, tensor)
        self.mlm = VocabParallelHead(
            config.hidden_size, config.text_vocab_size, config.cross_entropy_chunk_size, tensor
        )

    @property
    def word_table(self) -> VocabParallelHead:
        """Returns the MLM head, whose matrix may be the word table."""
        return self.mlm

    def forward(self, h_MD: Tensor, batch: PackedBatch, with_loss: bool) -> Any:
        """Returns the sums of cross entropies of the four terms, (4,) float32, or the logits.

        Args:
            h_MD: normalised rows at masked positions, (M, D), in the order: patches of images, patches of pairs, tokens
                of captions, tokens of texts.
            batch: the packed micro-batch, with visual codes if `with_loss`.
            with_loss: whether to return the sums.
        """
        image_mim, pair_mim, pair_mlm, text_mlm = batch.head_row_counts
        h_patches, h_tokens = h_MD.split([image_mim + pair_mim, pair_mlm + text_mlm])
        if not with_loss:
            return Logits(self.mim.logits(h_patches), self.mlm.logits(h_tokens))
        assert VISUAL_CODES in batch.targets, "the batch has no visual codes: call with_visual_codes first"
        visual_losses = self.mim(h_patches, batch.targets[VISUAL_CODES]).loss
        text_losses = self.mlm(h_tokens, batch.targets[TARGET_IDS]).loss
        images, pairs = visual_losses.split([image_mim, pair_mim])
        captions, texts = text_losses.split([pair_mlm, text_mlm])
        return torch.stack([images.sum(), texts.sum(), pairs.sum(), captions.sum()])


def head_flops(model: ModelConfig, term_counts: Sequence[float]) -> float:
    """Returns the forward operations of both heads, given the number of masked positions per term."""
    image_mim, text_mlm, pair_mim, pair_mlm = term_counts
    logits = (image_mim + pair_mim) * model.visual_vocab_size + (text_mlm + pair_mlm) * model.text_vocab_size
    return 2 * model.hidden_size * logits
