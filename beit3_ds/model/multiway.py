"""Linear layers and norms of which every expert has its own, applied to the expert's slice of the packed stream."""

# T packed rows, D input width, F output width.

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_ds.batch import PackedBatch, Route
from beit3_ds.kernels.multiway_linear import multiway_bias, multiway_linear
from beit3_ds.parallel import TensorParallel, normalize_split, split_parameter


class ColumnParallelMultiwayLinear(nn.Module):
    """One linear layer an expert (paper section 2.1), its output features split over the tensor-parallel ranks.

    Follow it with RowParallelMultiwayLinear, and hand its input in through `TensorParallel.copy_in`, once for all the
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
        return multiway_linear(x_TD, _slices(self, batch), _weights(self), _biases(self))


class RowParallelMultiwayLinear(nn.Module):
    """One linear layer an expert, its input features split over the tensor-parallel ranks.

    Forward all-reduces T * D elements; backward sends nothing. The bias is held by every rank and added once, after the
    reduction. Parameters as in ColumnParallelMultiwayLinear.
    """

    def __init__(self, in_features: int, out_features: int, experts: tuple[str, ...], tensor: TensorParallel) -> None:
        super().__init__()
        self.experts, self.tensor = experts, tensor
        split = tensor.split(in_features, dim=1)
        for expert in experts:
            self.register_parameter(f"weight_{expert}", split_parameter(split, out_features, in_features))
            self.register_parameter(f"bias_{expert}", nn.Parameter(torch.empty(out_features)))

    def forward(self, x_TF: Tensor, batch: PackedBatch) -> Tensor:
        """Returns all features (T, D) of this rank's input features (T, F / P)."""
        slices = _slices(self, batch)
        partial_TD = multiway_linear(x_TF, slices, _weights(self), ())
        return multiway_bias(self.tensor.sum_out(partial_TD), slices, _biases(self))


class MultiwayLayerNorm(nn.Module):
    """One LayerNorm an expert; parameters are `weight_EXPERT` and `bias_EXPERT`, left uninitialised."""

    def __init__(self, hidden_size: int, epsilon: float, experts: tuple[str, ...]) -> None:
        super().__init__()
        self.hidden_size, self.epsilon, self.experts = hidden_size, epsilon, experts
        for expert in experts:
            self.register_parameter(f"weight_{expert}", nn.Parameter(torch.empty(hidden_size)))
            self.register_parameter(f"bias_{expert}", nn.Parameter(torch.empty(hidden_size)))

    def forward(self, x_TD: Tensor, routes: tuple[Route, ...]) -> Tensor:
        """Normalises every row with the parameters of its expert.

        Args:
            x_TD: rows of the stream, or rows gathered from it.
            routes: the experts' row ranges in x, in the order of `experts`.
        """
        parts = x_TD.split([route.stop - route.start for route in routes])
        normed = [self._normalize(part, route.expert) for part, route in zip(parts, routes, strict=True)]
        return normed[0] if len(normed) == 1 else torch.cat(normed)

    def _normalize(self, x_TD: Tensor, expert: str) -> Tensor:
        weight, bias = getattr(self, f"weight_{expert}"), getattr(self, f"bias_{expert}")
        return F.layer_norm(x_TD, (self.hidden_size,), weight, bias, self.epsilon)


class SplitMultiwayLayerNorm(MultiwayLayerNorm):
    """A MultiwayLayerNorm over features that the tensor-parallel ranks divide, as sub-LN needs it.

    Communicates two floats a row each way (`parallel.normalize_split`).
    """

    def __init__(self, hidden_size: int, epsilon: float, experts: tuple[str, ...], tensor: TensorParallel) -> None:
        super().__init__(hidden_size, epsilon, experts)
        self.tensor = tensor
        split = tensor.split(hidden_size)
        for expert in experts:
            self.register_parameter(f"weight_{expert}", split_parameter(split, hidden_size))
            self.register_parameter(f"bias_{expert}", split_parameter(split, hidden_size))

    def forward(self, x_TF: Tensor, routes: tuple[Route, ...]) -> Tensor:
        """Normalises every row over all ranks' features and scales with the parameters of its expert.

        Args:
            x_TF: this rank's features.
            routes: the experts' row ranges in x, in the order of `experts`.
        """
        if self.tensor.size == 1:
            return super().forward(x_TF, routes)
        normed_TF = normalize_split(x_TF, self.epsilon, self.tensor)
        parts = normed_TF.split([route.stop - route.start for route in routes])
        return torch.cat(
            [torch.addcmul(b, part, w) for part, w, b in zip(parts, _weights(self), _biases(self), strict=True)]
        )


def _slices(module: Any, batch: PackedBatch) -> list[tuple[int, int]]:
    return [(route.start, route.stop) for route in batch.routes(module.experts)]


def _weights(module: Any) -> list[Tensor]:
    return [getattr(module, f"weight_{expert}") for expert in module.experts]


def _biases(module: Any) -> list[Tensor]:
    return [getattr(module, f"bias_{expert}") for expert in module.experts]
