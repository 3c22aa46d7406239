"""The two masked-modeling heads (paper section 2.2)."""

# T packed rows, D hidden, V vocabulary, M rows at masked positions.

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

    def forward(
        self, x_TD: Tensor, batch: PackedBatch, with_loss: bool, only_masked: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Returns (MIM, MLM) cross entropies of the masked patches and of the masked tokens, or their logits.

        Args:
            x_TD: this rank's rows of the stream, or of its masked rows.
            batch: tells the masked rows and their targets.
            with_loss: whether cross entropies are wanted.
            only_masked: whether x holds the masked rows alone.
        """
        masked = batch.masked_rows
        x_MD = self.tensor.gather_rows(x_TD, masked.num_rows if only_masked else batch.num_rows)
        if not only_masked:
            x_MD = x_MD.index_select(0, masked.rows)
        h_MD = self.norm(x_MD, masked.expert_slices(self.experts)).h_TD
        num_patches = masked.boundaries[1]
        h_patches, h_tokens = h_MD.split([num_patches, masked.num_rows - num_patches])
        if not with_loss:
            return self.mim.logits(h_patches), self.mlm.logits(h_tokens)
        assert batch.visual_targets is not None, "the batch has no visual targets: call with_visual_codes first"
        return self.mim(h_patches, batch.visual_targets), self.mlm(h_tokens, batch.target_ids)

    def normalize(self, x_TD: Tensor, batch: PackedBatch) -> Tensor:
        """Returns all rows after the final norm, (T, D)."""
        return self.norm(self.tensor.gather_rows(x_TD, batch.num_rows), batch.expert_slices(self.experts)).h_TD
