"""The two masked-modeling heads (paper section 2.2)."""

# T packed rows, D hidden, V vocabulary, M rows at masked positions.

import torch
from torch import Tensor, nn

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ModelConfig
from beit3_ds.model.multiway import MultiwayLayerNorm
from beit3_ds.parallel import TensorParallel, VocabParallelHead


class Heads(nn.Module):
    """Final norm, MIM head and MLM head, on masked positions only; tensor-parallel ranks divide both vocabularies.

    Where they divide the rows they gather them first (`TensorParallel.gather_rows`): every rank normalises all masked
    rows and works out its part of both vocabularies.
    """

    def __init__(self, config: ModelConfig, tensor: TensorParallel) -> None:
        super().__init__()
        self.experts, self.tensor = config.attention_experts, tensor
        self.norm = MultiwayLayerNorm(config.hidden_size, config.layer_norm_epsilon, self.experts, TensorParallel())
        self.mim = VocabParallelHead(config.hidden_size, config.visual_vocab_size, None, tensor)
        self.mlm = VocabParallelHead(
            config.hidden_size, config.text_vocab_size, config.cross_entropy_chunk_size, tensor
        )

    def forward(self, x_TD: Tensor, batch: PackedBatch, with_loss: bool) -> tuple[Tensor, Tensor]:
        """Returns (MIM, MLM) cross entropies of the masked patches and of the masked tokens, or their logits."""
        patches, tokens = batch.masked_patch_rows, batch.masked_token_rows
        rows = torch.cat([patches, tokens])
        x_TD = self.tensor.gather_rows(x_TD, batch.num_rows)
        _, h_MD, *_ = self.norm(x_TD.index_select(0, rows), self._slices(len(patches), len(rows)))
        h_patches, h_tokens = h_MD.split([len(patches), len(tokens)])
        if not with_loss:
            return self.mim.logits(h_patches), self.mlm.logits(h_tokens)
        assert batch.visual_targets is not None, "the batch has no visual targets: call with_visual_codes first"
        return self.mim(h_patches, batch.visual_targets), self.mlm(h_tokens, batch.target_ids)

    def normalize(self, x_TD: Tensor, batch: PackedBatch) -> Tensor:
        """Returns all rows after the final norm, (T, D)."""
        _, h_TD, *_ = self.norm(self.tensor.gather_rows(x_TD, batch.num_rows), batch.expert_slices(self.experts))
        return h_TD

    def _slices(self, num_patches: int, num_rows: int) -> list[tuple[int, int]]:
        return [(0, num_rows)] if self.experts == ("shared",) else [(0, num_patches), (num_patches, num_rows)]
