"""Linear layers and norms of which every expert has its own, applied to the expert's slice of the packed stream."""

# T packed rows, D input width, F output width.

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_ds.batch import PackedBatch
from beit3_ds.kernels.multiway_linear import multiway_bias, multiway_linear
from beit3_ds.parallel import TensorParallel, normalize_split, split_parameter


class ColumnParallelMultiwayLinear(nn.Module):
    """One linear layer an expert (paper section 2.1), its output features split over the tensor-parallel ranks.

    Follow it with RowParallelMultiwayLinear, and hand its input in through `TensorParallel.gather_in`, once for all the
    layers that share it. Sends nothing itself. Parameters are `weight_EXPERT` and `bias_EXPERT`; they belong to this
    module, not to children, so that a ZeRO-3 hook gathers them for the one call that uses them all. They are left
    uninitialised: see `initialization.initialize_parameters`.
    """

    def __init__(self, in_features: int, out_features: int, experts: tuple[str, ...], tensor: TensorParallel) -> None:
        super().__init__()
        self.experts = experts
        split = tensor.split(out_features)
        for expert in experts:
            self.register_parameter(f"weight_{expert}", split_parameter(split, out_features, in_features))
            self.register_parameter(f"bias_{expert}", split_parameter(split, out_features))

    def forward(self, x_TD: Tensor, batch: PackedBatch) -> Tensor:
        """Returns this rank's features (T, F / P), each row from its own expert; a single expert takes all rows."""
        return multiway_linear(x_TD, batch.expert_slices(self.experts), _weights(self), _biases(self))


class RowParallelMultiwayLinear(nn.Module):
    """One linear layer an expert, its input features split over the tensor-parallel ranks.

    Sends what `TensorParallel.scatter_out` does. The bias is held by every rank and added once, after the reduction.
    Parameters as in ColumnParallelMultiwayLinear.
    """

    def __init__(self, in_features: int, out_features: int, experts: tuple[str, ...], tensor: TensorParallel) -> None:
        super().__init__()
        self.experts, self.tensor = experts, tensor
        split = tensor.split(in_features, dim=1)
        for expert in experts:
            self.register_parameter(f"weight_{expert}", split_parameter(split, out_features, in_features))
            self.register_parameter(f"bias_{expert}", nn.Parameter(torch.empty(out_features)))

    def forward(self, x_TF: Tensor, batch: PackedBatch, *, gelu: bool = False) -> Tensor:
        """Returns all features of this rank's rows, (T, D), from its input features of all rows, (T, F / P).

        With `gelu` the input is activated first, and made again in the backward pass instead of kept.
        """
        slices = batch.expert_slices(self.experts)
        partial_TD = multiway_linear(x_TF, slices, _weights(self), (), gelu=gelu)
        own_slices = self.tensor.own_slices(slices, batch.num_rows)
        return multiway_bias(self.tensor.scatter_out(partial_TD), own_slices, self.tensor.share(*_biases(self)))


class MultiwayLayerNorm(nn.Module):
    """One LayerNorm an expert; parameters are `weight_EXPERT` and `bias_EXPERT`, left uninitialised."""

    def __init__(
        self,
        hidden_size: int,
        epsilon: float,
        experts: tuple[str, ...],
        *,
        width: TensorParallel | None = None,
        rows: TensorParallel | None = None,
    ) -> None:
        """Builds the norms.

        Args:
            hidden_size: width of a row, over all ranks.
            epsilon: added to the variance.
            experts: names of the experts.
            width: the ranks that divide the width, as those of a sub-LN are; None if every rank holds whole rows.
            rows: the ranks that may divide the rows; None if every rank has all rows.
        """
        super().__init__()
        self.epsilon, self.experts = epsilon, experts
        self.width, self.rows = width or TensorParallel(), rows or TensorParallel()
        split = self.width.split(hidden_size)
        for expert in experts:
            self.register_parameter(f"weight_{expert}", split_parameter(split, hidden_size))
            self.register_parameter(f"bias_{expert}", split_parameter(split, hidden_size))

    def forward(self, x_TD: Tensor, slices: Sequence[tuple[int, int]]) -> Tensor:
        """Normalises every row and scales it with the parameters of its expert.

        Communicates two floats a row each way where ranks divide the width (`parallel.normalize_split`), and the
        parameters' gradients where they divide the rows (`TensorParallel.share`).

        Args:
            x_TD: rows of the stream, or rows gathered from it; of a divided width this rank's features.
            slices: the experts' row ranges in x, in the order of `experts`.
        """
        divided = self.width.size > 1
        if divided:
            x_TD = normalize_split(x_TD, self.epsilon, self.width)
        parts = x_TD.split([stop - start for start, stop in slices])
        parameters = self.rows.share(*_weights(self), *_biases(self))
        weights, biases = parameters[: len(parts)], parameters[len(parts) :]
        scaled = [
            torch.addcmul(b, part, w) if divided else F.layer_norm(part, w.shape, w, b, self.epsilon)
            for part, w, b in zip(parts, weights, biases, strict=True)
        ]
        return scaled[0] if len(scaled) == 1 else torch.cat(scaled)


def _weights(module: Any) -> list[Tensor]:
    return [getattr(module, f"weight_{expert}") for expert in module.experts]


def _biases(module: Any) -> list[Tensor]:
    return [getattr(module, f"bias_{expert}") for expert in module.experts]
