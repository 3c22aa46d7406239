"""Implements multi-head self-attention, shared by all modalities (paper, section 2.1)."""

# T packed rows, D hidden, H heads, K head width.

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from beit3_ds.config import ModelConfig
from beit3_ds.kernels.ops.multiway_qkv import multiway_qkv
from beit3_ds.kernels.ops.packed_attention import packed_attention
from beit3_ds.kernels.ops.up_projection import Activation
from beit3_ds.layout import SequenceLayout
from beit3_ds.model.dense.relative_positions import RelativePositions, covered_extent
from beit3_ds.model.multiway import (
    ColumnParallelMultiwayLinear,
    MultiwayLayerNorm,
    MultiwaySubLayerNorm,
    RowParallelMultiwayLinear,
)
from beit3_ds.parallel import TensorParallel

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Function that computes attention outputs from queries, keys and values. All tensors are (rows, heads, head width)."""


class MultiwayAttention(nn.Module):
    """Applies pre-norm self-attention within each sequence, and adds the result to the residual stream.

    The image and caption of a pair form one sequence. Attention is bidirectional, except with causal captions
    (`SequenceLayout.causal_captions`).

    In the `shared` layout, all rows use the same weights. In the `decoupled` layout, vision rows and language rows have
    separate projections and norms, but attend to each other. With `sub_layernorm`, a LayerNorm over the concatenated
    heads precedes the output projection (Magneto, arXiv:2210.06423).

    Heads are split over the tensor-parallel group. The forward pass and the backward pass each exchange T rows of
    hidden size D (`TensorParallel.gather_from`, `reduce_scatter_to`). With a sub-LayerNorm, each pass also exchanges
    two floats per row.
    """

    def __init__(self, config: ModelConfig, layer: int, tensor: TensorParallel) -> None:
        super().__init__()
        self.window_size, self.order = config.block_window(layer), config.window_size
        hidden, experts, epsilon = config.hidden_size, config.attention_experts, config.layer_norm_epsilon
        self.experts, self.head_size, self.tensor = experts, config.head_size, tensor
        self.norm = MultiwayLayerNorm(hidden, epsilon, experts, tensor)
        self.q_proj = ColumnParallelMultiwayLinear(hidden, hidden, experts, tensor)
        self.k_proj = ColumnParallelMultiwayLinear(hidden, hidden, experts, tensor)
        self.v_proj = ColumnParallelMultiwayLinear(hidden, hidden, experts, tensor)
        self.relative_position = (
            RelativePositions(covered_extent(config, layer), config.head_size, tensor)
            if config.dense is not None and config.dense.relative_positions
            else None
        )
        self.sub_norm = MultiwaySubLayerNorm(hidden, epsilon, experts, tensor) if config.sub_layernorm else None
        self.out_proj = RowParallelMultiwayLinear(hidden, hidden, experts, tensor)

    def forward(
        self, x_TD: Tensor, factor_T: Tensor | None, layout: SequenceLayout, attend: Attend | None = None
    ) -> Tensor:
        """Computes attention, adds it to the residual stream, and returns this rank's rows of the stream, shaped like
        `x_TD`.

        Args:
            x_TD: this rank's rows of the residual stream; with sequence parallelism, only a part of the T rows.
            factor_T: stochastic-depth factor of each row of `x_TD`; None without stochastic depth.
            layout: row ranges of the sequences and of the experts.
            attend: function that computes this rank's heads from queries, keys and values. Arguments and result are (T,
                H, K), with all T rows. None computes attention within the sequences of `layout`.
        """
        slices, num_rows = layout.expert_slices(self.experts), layout.num_rows
        stream_TD, h_TD, recompute = self.norm(x_TD, self.tensor.own_slices(slices, num_rows))
        h_TD = self.tensor.gather_from(h_TD, num_rows)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        weights, biases = (
            [w for proj in projections for w in proj.weights()],
            [b for proj in projections for b in proj.biases()],
        )
        q_THK, k_THK, v_THK = map(self._heads, multiway_qkv(h_TD, slices, weights, biases, recompute))
        y_THK = (attend or self.within(layout))(q_THK, k_THK, v_THK)
        norm = None if self.sub_norm is None else self.sub_norm()
        return self.out_proj(Activation(y_THK.flatten(1)), stream_TD, factor_T, layout, norm=norm)

    def _heads(self, x_TD: Tensor) -> Tensor:
        num_rows, width = x_TD.shape
        return x_TD.view(num_rows, width // self.head_size, self.head_size)

    def within(self, layout: SequenceLayout) -> Attend:
        """Returns a function that computes attention within each sequence of `layout`, or within each image window if
        this block has windows.
        """
        attend = partial(
            packed_attention,
            ranges=layout.attention_ranges(self.window_size),
            causal_captions=layout.causal_captions,
        )
        relative_position = self.relative_position
        if relative_position is None:
            return attend

        def attend_relatively(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor) -> Tensor:
            wider = relative_position(q_THK, k_THK, v_THK, layout.image_grids, self.order, self.window_size)
            return attend(*wider)[..., : self.head_size]

        return attend_relatively
