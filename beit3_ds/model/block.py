"""One Multiway Transformer block."""

# T packed rows, D hidden, Q sequences, L layers.

from torch import Tensor, nn

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ModelConfig
from beit3_ds.model.attention import MultiwayAttention
from beit3_ds.model.ffn import MultiwayFFN
from beit3_ds.parallel import TensorParallel


class Block(nn.Module):
    """x += drop_path(attention(x)), then x += drop_path(ffn(x)); both branches normalise their input.

    Stochastic depth (paper section 2.3) is drawn with the batch, per sample, one draw for both parts of a pair, so the
    forward pass itself is deterministic and may be recomputed or reordered.
    """

    def __init__(self, config: ModelConfig, layer: int, tensor: TensorParallel, cuda_cpp: bool = False) -> None:
        super().__init__()
        self.layer, self.tensor = layer, tensor
        self.attention = MultiwayAttention(config, tensor, cuda_cpp)
        self.ffn = MultiwayFFN(config, layer, tensor, cuda_cpp)

    def forward(self, x_TD: Tensor, batch: PackedBatch) -> Tensor:
        """Returns the stream after this block, (T, D); of both, this rank's rows."""
        x_TD = self.attention(x_TD, self._factors(x_TD, batch, branch=0), batch)
        return self.ffn(x_TD, self._factors(x_TD, batch, branch=1), batch)

    def _factors(self, x_TD: Tensor, batch: PackedBatch, branch: int) -> Tensor | None:
        if batch.drop_path is None:
            return None
        factor_Q = batch.drop_path[:, self.layer, branch].to(x_TD.dtype)
        return factor_Q[self.tensor.own_rows(batch.row_sequence)]
