"""Implements the feed-forward experts of a block (paper, section 2.1)."""

# T packed rows, D hidden.

from torch import Tensor, nn

from beit3_ds.config import ModelConfig
from beit3_ds.layout import RowLayout
from beit3_ds.model.multiway import (
    MultiwayLayerNorm,
    MultiwaySubLayerNorm,
    RowParallelMultiwayLinear,
    UpProjection,
)
from beit3_ds.parallel import TensorParallel


class MultiwayFFN(nn.Module):
    """Applies a pre-norm feed-forward network per expert, and adds the result to the residual stream.

    A row's position in the packed batch selects its expert. With `sub_layernorm`, a LayerNorm precedes the second
    linear layer (Magneto, arXiv:2210.06423). The forward pass saves only one tensor of the FFN's inner width F, the
    input of GELU. The backward pass recomputes the others.

    The inner width F of every expert is split over the tensor-parallel group. The forward pass and the backward pass
    each exchange T rows of the model's hidden size D (`TensorParallel.gather_from`, `reduce_scatter_to`). With
    `sub_layernorm`, each pass also exchanges two floats per row.
    """

    def __init__(self, config: ModelConfig, layer: int, tensor: TensorParallel) -> None:
        super().__init__()
        hidden, ffn_hidden, experts = config.hidden_size, config.ffn_hidden_size, config.experts(layer)
        epsilon = config.layer_norm_epsilon
        self.experts, self.tensor = experts, tensor
        self.norm = MultiwayLayerNorm(hidden, epsilon, experts, tensor)
        self.fc1 = UpProjection(hidden, ffn_hidden, experts, tensor)
        self.sub_norm = MultiwaySubLayerNorm(ffn_hidden, epsilon, experts, tensor) if config.sub_layernorm else None
        self.fc2 = RowParallelMultiwayLinear(ffn_hidden, hidden, experts, tensor)

    def forward(self, x_TD: Tensor, factor_T: Tensor | None, layout: RowLayout) -> Tensor:
        """Computes the FFN, adds it to the residual stream, and returns this rank's rows of the stream, (T, D).

        Args:
            x_TD: this rank's rows of the residual stream. In the last block, the stream may have only the rows that the
                head reads.
            factor_T: stochastic-depth factor of each row of `x_TD`; None without stochastic depth.
            layout: row ranges of the experts.
        """
        slices, num_rows = layout.expert_slices(self.experts), layout.num_rows
        stream_TD, h_TD, recompute = self.norm(x_TD, self.tensor.own_slices(slices, num_rows))
        h_TD = self.tensor.gather_from(h_TD, num_rows)
        activation = self.fc1(h_TD, layout, recompute, has_norm=self.sub_norm is not None)
        norm = None if self.sub_norm is None else self.sub_norm()
        return self.fc2(activation, stream_TD, factor_T, layout, gelu=True, norm=norm)
