"""The two masked-modeling heads (paper section 2.2)."""

# T packed rows, D hidden, V vocabulary, M rows at masked positions.

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_ds.batch import PackedBatch, Route
from beit3_ds.config import ModelConfig
from beit3_ds.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from beit3_ds.model.multiway import MultiwayLayerNorm


class PredictionHead(nn.Module):
    """A linear layer over a vocabulary, with bias and untied from any embedding; parameters are left uninitialised."""

    def __init__(self, hidden_size: int, vocab_size: int, chunk_size: int | None) -> None:
        """Builds the head.

        Args:
            hidden_size: D.
            vocab_size: V.
            chunk_size: rows whose logits exist at a time; None computes all at once, which is faster for small V.
        """
        super().__init__()
        self.chunk_size = chunk_size
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(vocab_size))

    def forward(self, h_MD: Tensor, target_M: Tensor | None) -> Tensor:
        """Returns every row's cross entropy, (M,) float32; without targets the logits, (M, V)."""
        if target_M is None:
            return F.linear(h_MD, self.weight, self.bias)
        if self.chunk_size is None:
            return linear_cross_entropy_reference(h_MD, self.weight, self.bias, target_M)
        return linear_cross_entropy(h_MD, self.weight, self.bias, target_M, self.chunk_size)


class Heads(nn.Module):
    """Final norm, MIM head and MLM head, on masked positions only."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.experts = config.attention_experts
        self.norm = MultiwayLayerNorm(config.hidden_size, config.layer_norm_epsilon, self.experts)
        self.mim = PredictionHead(config.hidden_size, config.visual_vocab_size, None)
        self.mlm = PredictionHead(config.hidden_size, config.text_vocab_size, config.cross_entropy_chunk_size)

    def forward(self, x_TD: Tensor, batch: PackedBatch, with_loss: bool) -> tuple[Tensor, Tensor]:
        """Returns (MIM, MLM) cross entropies of the masked patches and of the masked tokens, or their logits."""
        patches, tokens = batch.masked_patch_rows, batch.masked_token_rows
        rows = torch.cat([patches, tokens])
        h_MD = self.norm(x_TD.index_select(0, rows), self._routes(len(patches), len(rows)))
        h_patches, h_tokens = h_MD.split([len(patches), len(tokens)])
        if not with_loss:
            return self.mim(h_patches, None), self.mlm(h_tokens, None)
        assert batch.visual_targets is not None, "the batch has no visual targets: call with_visual_codes first"
        return self.mim(h_patches, batch.visual_targets), self.mlm(h_tokens, batch.target_ids)

    def _routes(self, num_patches: int, num_rows: int) -> tuple[Route, ...]:
        if self.experts == ("shared",):
            return (Route("shared", 0, num_rows),)
        return (Route("vision", 0, num_patches), Route("language", num_patches, num_rows))
