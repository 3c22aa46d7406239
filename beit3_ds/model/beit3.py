"""BEiT-3: an ordered list of layers over one packed stream."""

# T packed rows, D hidden, V vocabulary.

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ModelConfig
from beit3_ds.model.block import Block
from beit3_ds.model.embeddings import Embeddings
from beit3_ds.model.heads import Heads
from beit3_ds.parallel import TensorParallel


class LossOutput(NamedTuple):
    """The loss of one micro-batch."""

    total: Tensor
    """Weighted sum to differentiate, float32 scalar."""
    sums: Tensor
    """Sum of cross entropies of each of `batch.LOSS_TERMS`, (4,) float32, detached."""


class Logits(NamedTuple):
    """Scores at the masked positions of one micro-batch."""

    visual: Tensor
    """(masked patches, visual vocabulary)."""
    text: Tensor
    """(masked tokens, text vocabulary)."""


class BEiT3(nn.Module):
    """The Multiway Transformer with its masked-modeling heads (paper section 2).

    Layers run in the order embeddings, blocks, heads, and hand on nothing but the stream x_TD, so the list can be cut
    anywhere. Modules keep no state of a batch, and the forward pass draws nothing random. Parameters are uninitialised
    until `initialize_parameters`.
    """

    def __init__(
        self, config: ModelConfig, tensor: TensorParallel | None = None, activation_checkpointing: bool = False
    ) -> None:
        """Builds the layers.

        Args:
            config: sizes and layout.
            tensor: the ranks that divide every layer; None is this process alone.
            activation_checkpointing: recompute each block in the backward pass.
        """
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        tensor = tensor or TensorParallel()
        self.embeddings = Embeddings(config, tensor)
        self.blocks = nn.ModuleList(Block(config, layer, tensor) for layer in range(config.num_layers))
        self.heads = Heads(config, tensor)

    def forward(self, batch: PackedBatch, loss_factors: Tensor | None) -> LossOutput | Logits:
        """Runs one micro-batch.

        Args:
            batch: the packed micro-batch, with visual targets if a loss is wanted.
            loss_factors: what each of `batch.LOSS_TERMS` is multiplied by, (4,) float32, that is weight / count of the
                whole step; None asks for logits.

        Returns:
            The loss, or the logits at masked positions.
        """
        x_TD = self.embeddings(batch)
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_TD = checkpoint(block, x_TD, batch, use_reentrant=False, preserve_rng_state=False)
            else:
                x_TD = block(x_TD, batch)
        visual, text = self.heads(x_TD, batch, with_loss=loss_factors is not None)
        if loss_factors is None:
            return Logits(visual, text)
        sums = _sum_terms(visual, text, batch)
        return LossOutput((sums * loss_factors).sum(), sums.detach())


def _sum_terms(visual_losses: Tensor, text_losses: Tensor, batch: PackedBatch) -> Tensor:
    image_mim, text_mlm, pair_mim, pair_mlm = batch.num_masked
    images, pairs = visual_losses.split([image_mim, pair_mim])
    captions, texts = text_losses.split([pair_mlm, text_mlm])
    return torch.stack([images.sum(), texts.sum(), pairs.sum(), captions.sum()])
