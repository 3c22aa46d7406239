"""The pool of modality experts (paper section 2.1)."""

# T packed rows, D hidden, F ffn hidden.

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ModelConfig
from beit3_ds.model.multiway import (
    ColumnParallelMultiwayLinear,
    MultiwayLayerNorm,
    RowParallelMultiwayLinear,
)
from beit3_ds.parallel import TensorParallel


class MultiwayFFN(nn.Module):
    """Pre-norm feed-forward network of which every expert has its own; rows are routed by their place in the stream.

    With `sub_layernorm` the activations are normalised before the down projection (Magneto, arXiv:2210.06423).

    The tensor-parallel ranks divide every expert's width. They exchange T * D elements each way
    (`TensorParallel.gather_in`, `scatter_out`), and two floats a row for a sub-LN.
    """

    def __init__(self, config: ModelConfig, layer: int, tensor: TensorParallel, recompute_gelu: bool = False) -> None:
        super().__init__()
        self.recompute_gelu = recompute_gelu
        hidden, ffn_hidden, experts = config.hidden_size, config.ffn_hidden_size, config.experts(layer)
        epsilon = config.layer_norm_epsilon
        self.experts, self.tensor = experts, tensor
        self.norm = MultiwayLayerNorm(hidden, epsilon, experts, rows=tensor)
        self.fc1 = ColumnParallelMultiwayLinear(hidden, ffn_hidden, experts, tensor)
        self.sub_norm = MultiwayLayerNorm(ffn_hidden, epsilon, experts, width=tensor) if config.sub_layernorm else None
        self.fc2 = RowParallelMultiwayLinear(ffn_hidden, hidden, experts, tensor)

    def forward(self, x_TD: Tensor, batch: PackedBatch) -> Tensor:
        """Returns the branch's output (T, D), without the residual; of both, this rank's rows."""
        slices, num_rows = batch.expert_slices(self.experts), batch.num_rows
        h_TD = self.norm(x_TD, self.tensor.own_slices(slices, num_rows))
        u_TF = self.fc1(self.tensor.gather_in(h_TD, num_rows), batch)
        if self.sub_norm is None:
            # One op with the down projection, which need not keep what it can make again.
            return self.fc2(u_TF, batch, gelu=True) if self.recompute_gelu else self.fc2(F.gelu(u_TF), batch)
        if self.recompute_gelu and torch.is_grad_enabled():
            h_TF = checkpoint(self._activate, u_TF, slices, use_reentrant=False, preserve_rng_state=False)
        else:
            h_TF = self._activate(u_TF, slices)
        return self.fc2(h_TF, batch)

    def _activate(self, u_TF: Tensor, slices: list[tuple[int, int]]) -> Tensor:
        assert self.sub_norm is not None
        return self.sub_norm(F.gelu(u_TF), slices)  # exact (erf) GELU
