"""The two masked-modeling heads (paper section 2.2)."""

# T packed rows, D hidden, V vocabulary, M rows at masked positions.

import torch
from torch import Tensor, nn

from beit3_ds.batch import PackedBatch, Route
from beit3_ds.config import ModelConfig
from beit3_ds.model.multiway import MultiwayLayerNorm
from beit3_ds.parallel import TensorParallel, VocabParallelHead


class Heads(nn.Module):
    """Final norm, MIM head and MLM head, on masked positions only; tensor-parallel ranks divide both vocabularies."""

    def __init__(self, config: ModelConfig, tensor: TensorParallel) -> None:
        super().__init__()
        self.experts = config.attention_experts
        self.norm = MultiwayLayerNorm(config.hidden_size, config.layer_norm_epsilon, self.experts)
        self.mim = VocabParallelHead(config.hidden_size, config.visual_vocab_size, None, tensor)
        self.mlm = VocabParallelHead(
            config.hidden_size, config.text_vocab_size, config.cross_entropy_chunk_size, tensor
        )

    def forward(self, x_TD: Tensor, batch: PackedBatch, with_loss: bool) -> tuple[Tensor, Tensor]:
        """Returns (MIM, MLM) cross entropies of the masked patches and of the masked tokens, or their logits."""
        patches, tokens = batch.masked_patch_rows, batch.masked_token_rows
        rows = torch.cat([patches, tokens])
        h_MD = self.norm(x_TD.index_select(0, rows), self._routes(len(patches), len(rows)))
        h_patches, h_tokens = h_MD.split([len(patches), len(tokens)])
        if not with_loss:
            return self.mim.logits(h_patches), self.mlm.logits(h_tokens)
        assert batch.visual_targets is not None, "the batch has no visual targets: call with_visual_codes first"
        return self.mim(h_patches, batch.visual_targets), self.mlm(h_tokens, batch.target_ids)

    def _routes(self, num_patches: int, num_rows: int) -> tuple[Route, ...]:
        if self.experts == ("shared",):
            return (Route("shared", 0, num_rows),)
        return (Route("vision", 0, num_patches), Route("language", num_patches, num_rows))
