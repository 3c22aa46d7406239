"""Implements a Multiway Transformer block."""

# T packed rows, K rows of sequences whose branch is not dropped, M rows that the head reads, D hidden,
# Q sequences.

from torch import Tensor, nn

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ModelConfig
from beit3_ds.device_copy import copy_to_device
from beit3_ds.kernels.ops.row_subset import put_rows, take_rows
from beit3_ds.layout import KeptSequences
from beit3_ds.model.attention import MultiwayAttention
from beit3_ds.model.ffn import MultiwayFFN
from beit3_ds.parallel import TensorParallel

_LEAST_DROPPED, _LEAST_DROPPED_ON_CPU = 1 / 8, 1 / 32
"""Smallest fraction of dropped rows at which attention or FFN skips these rows, on GPUs and on CPUs.

Below this fraction, copying the kept rows costs more than computing all rows. The CPU value was measured, and the GPU
value was modelled (BENCHMARKS.md).
"""


class Block(nn.Module):
    """Computes x += drop_path(attention(x)) and then x += drop_path(ffn(x)), each with a pre-norm.

    The random draws of stochastic depth (paper, section 2.3) are part of the batch, so the forward pass is
    deterministic and may be recomputed. The image and caption of a pair share one draw. Attention and FFN skip dropped
    sequences if this saves time (`computed_sequences`).
    """

    def __init__(self, config: ModelConfig, layer: int, tensor: TensorParallel) -> None:
        super().__init__()
        self.layer, self.tensor = layer, tensor
        self.attention = MultiwayAttention(config, layer, tensor)
        self.ffn = MultiwayFFN(config, layer, tensor)

    def forward(self, x_TD: Tensor, batch: PackedBatch, only_head_rows: bool = False) -> Tensor:
        """Runs the block, and returns this rank's rows of the new residual stream.

        Args:
            x_TD: this rank's rows of the residual stream.
            batch: the packed micro-batch.
            only_head_rows: whether the new stream has only the rows in `PackedBatch.head_rows`; used for the last
                block. With sequence parallelism, these rows are gathered and then divided over the ranks again
                (`TensorParallel.gather_rows`, `scatter_rows`).
        """
        x_TD = self._residual_add(0, x_TD, batch)
        if not only_head_rows:
            return self._residual_add(1, x_TD, batch)
        picked = batch.picked_rows
        assert picked is not None, "the head reads all rows"
        x_MD = self.tensor.scatter_rows(self.tensor.gather_rows(x_TD, batch.num_rows).index_select(0, picked.rows))
        return self.ffn(x_MD, self._factors(x_MD, batch, branch=1, rows=picked.rows), picked)

    def _residual_add(self, branch: int, x_TD: Tensor, batch: PackedBatch) -> Tensor:
        module = self.attention if branch == 0 else self.ffn
        kept = None if self.tensor.divides_rows else computed_sequences(batch, self.layer, branch)
        if kept is None:
            return module(x_TD, self._factors(x_TD, batch, branch), batch.layout)
        rows_K = copy_to_device(kept.rows, x_TD.device)
        x_TD, x_KD = take_rows(x_TD, rows_K)
        y_KD = module(x_KD, self._factors(x_KD, batch, branch, rows_K), kept.layout)
        return put_rows(x_TD, y_KD, rows_K)

    def _factors(self, x_TD: Tensor, batch: PackedBatch, branch: int, rows: Tensor | None = None) -> Tensor | None:
        """Returns the stochastic-depth factors of this rank's rows, or None without stochastic depth.

        Args:
            x_TD: tensor whose dtype the factors get.
            batch: the packed micro-batch.
            branch: 0 for attention, 1 for the FFN.
            rows: indices of the selected rows in the packed batch; None selects all rows. With sequence parallelism,
                the ranks divide the selected rows.
        """
        factor_T = batch.row_factors(self.layer, branch, x_TD.dtype)
        if factor_T is None:
            return None
        return self.tensor.own_rows(factor_T if rows is None else factor_T.index_select(0, rows))


def computed_sequences(batch: PackedBatch, layer: int, branch: int) -> KeptSequences | None:
    """Returns the sequences that attention or FFN computes, or None for all sequences.

    Stochastic depth drops some sequences. If skipping the dropped sequences would not save time, all sequences are
    computed.

    Args:
        batch: the packed micro-batch.
        layer: index of the block, from 0.
        branch: 0 for attention, 1 for the FFN.
    """
    if batch.drop_path is None:
        return None
    least = _LEAST_DROPPED_ON_CPU if batch.token_ids.device.type == "cpu" else _LEAST_DROPPED
    num_dropped = batch.dropped_rows[layer][branch]
    return batch.kept_sequences(layer, branch) if num_dropped and num_dropped >= least * batch.num_rows else None
