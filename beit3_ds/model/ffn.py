"""The pool of modality experts (paper section 2.1)."""

# T packed rows, D hidden, F ffn hidden.

import torch.nn.functional as F
from torch import Tensor, nn

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

    The tensor-parallel ranks divide every expert's width. They all-reduce T * D elements each way, and two floats a row
    for a sub-LN.
    """

    def __init__(self, config: ModelConfig, layer: int, tensor: TensorParallel) -> None:
        super().__init__()
        hidden, ffn_hidden, experts = config.hidden_size, config.ffn_hidden_size, config.experts(layer)
        epsilon = config.layer_norm_epsilon
        self.experts, self.tensor = experts, tensor
        self.norm = MultiwayLayerNorm(hidden, epsilon, experts)
        self.fc1 = ColumnParallelMultiwayLinear(hidden, ffn_hidden, experts, tensor)
        self.sub_norm = MultiwayLayerNorm(ffn_hidden, epsilon, experts, tensor) if config.sub_layernorm else None
        self.fc2 = RowParallelMultiwayLinear(ffn_hidden, hidden, experts, tensor)

    def forward(self, x_TD: Tensor, batch: PackedBatch) -> Tensor:
        """Returns the branch's output (T, D), without the residual."""
        routes = batch.routes(self.experts)
        h_TF = F.gelu(self.fc1(self.tensor.copy_in(self.norm(x_TD, routes)), batch))  # exact (erf) GELU
        if self.sub_norm is not None:
            h_TF = self.sub_norm(h_TF, routes)
        return self.fc2(h_TF, batch)
