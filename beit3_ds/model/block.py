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

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        tensor: TensorParallel,
        recompute_gelu: bool = False,
        cuda_cpp: bool = False,
    ) -> None:
        super().__init__()
        self.layer, self.tensor = layer, tensor
        self.attention = MultiwayAttention(config, tensor, cuda_cpp)
        self.ffn = MultiwayFFN(config, layer, tensor, recompute_gelu)

    def forward(self, x_TD: Tensor, batch: PackedBatch) -> Tensor:
        """Returns the stream after this block, (T, D); of both, this rank's rows."""
        x_TD = self._add(x_TD, self.attention(x_TD, batch), batch, branch=0)
        return self._add(x_TD, self.ffn(x_TD, batch), batch, branch=1)

    def _add(self, x_TD: Tensor, y_TD: Tensor, batch: PackedBatch, branch: int) -> Tensor:
        if batch.drop_path is None:
            return x_TD + y_TD
        factor_Q = batch.drop_path[:, self.layer, branch].to(y_TD.dtype)
        factor_T = factor_Q[self.tensor.own_rows(batch.row_sequence)]
        return x_TD.addcmul(y_TD, factor_T.unsqueeze(1))
