"""Implements the MIM head and the MLM head of masked data modeling (paper section 2.2)."""

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
    """Holds the logits at the masked positions of one micro-batch."""

    visual: Tensor
    """Logits of visual tokens, (masked patches, visual vocabulary)."""
    text: Tensor
    """Logits of text tokens, (masked tokens, text vocabulary)."""


class MaskedModelingHeads(Head):
    """Contains the MIM head and the MLM head, whose vocabularies are split over the tensor-parallel group.

    A model without images has no MIM head. A model without texts has no MLM head (`ModelConfig.inputs`).
    """

    def __init__(self, config: ModelConfig, tensor: TensorParallel) -> None:
        super().__init__()
        self.config = config
        if "vision" in config.modalities:
            self.mim = VocabParallelHead(config.hidden_size, config.visual_vocab_size, None, tensor)
        if "language" in config.modalities:
            chunk_size = config.cross_entropy_chunk_size
            self.mlm = VocabParallelHead(config.hidden_size, config.text_vocab_size, chunk_size, tensor)

    @property
    def word_layer(self) -> VocabParallelHead | None:
        """Returns the MLM head, which predicts words; None in a model without texts.

        The weight of the MLM head may be tied to the word embedding.
        """
        return self.mlm if "language" in self.config.modalities else None

    def forward(self, h_MD: Tensor, batch: PackedBatch, with_loss: bool) -> Any:
        """Returns the summed cross entropy of each of the four terms, (4,) float32, or the logits.

        Args:
            h_MD: normalised hidden states at masked positions, (rows, hidden size), in the order: patches of images,
                patches of pairs, tokens of captions, tokens of texts.
            batch: the packed micro-batch; needs `VISUAL_CODES` if `with_loss`.
            with_loss: True returns the sums, in the order: image MIM, text MLM, pair MIM, pair MLM. False returns
                `Logits`.
        """
        image_mim, pair_mim, pair_mlm, text_mlm = batch.head_row_counts
        h_patches, h_tokens = h_MD.split([image_mim + pair_mim, pair_mlm + text_mlm])
        vision, language = (modality in self.config.modalities for modality in ("vision", "language"))
        if not with_loss:
            no_codes = h_MD.new_empty(0, self.config.visual_vocab_size)
            no_words = h_MD.new_empty(0, self.config.text_vocab_size)
            return Logits(
                self.mim.logits(h_patches) if vision else no_codes, self.mlm.logits(h_tokens) if language else no_words
            )
        assert VISUAL_CODES in batch.targets, "the batch has no visual codes: call with_visual_codes first"
        nothing = h_MD.new_empty(0, dtype=torch.float32)
        visual_losses = self.mim(h_patches, batch.targets[VISUAL_CODES]).loss if vision else nothing
        text_losses = self.mlm(h_tokens, batch.targets[TARGET_IDS]).loss if language else nothing
        images, pairs = visual_losses.split([image_mim, pair_mim])
        captions, texts = text_losses.split([pair_mlm, text_mlm])
        return torch.stack([images.sum(), texts.sum(), pairs.sum(), captions.sum()])


def head_flops(model: ModelConfig, term_counts: Sequence[float]) -> float:
    """Returns the floating-point operations of a forward pass of the MIM and MLM heads; a multiply-add counts as 2.

    Args:
        model: model configuration with the hidden size and the vocabulary sizes.
        term_counts: number of masked positions per loss term, in this order: image MIM, text MLM, pair MIM, pair MLM.
    """
    image_mim, text_mlm, pair_mim, pair_mlm = term_counts
    logits = (image_mim + pair_mim) * model.visual_vocab_size + (text_mlm + pair_mlm) * model.text_vocab_size
    return 2 * model.hidden_size * logits
