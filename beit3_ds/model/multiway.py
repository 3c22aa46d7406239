"""Implements linear layers and norms per expert, applied to the expert's slice of the packed stream."""

# T packed rows, D input width, F output width.

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from beit3_ds.kernels.ops.multiway_layer_norm import multiway_layer_norm, recomputable_rows
from beit3_ds.kernels.ops.out_projection import out_projection
from beit3_ds.kernels.ops.recompute import Recomputable
from beit3_ds.kernels.ops.residual_add import residual_add
from beit3_ds.kernels.ops.sub_norm import SubNorm
from beit3_ds.kernels.ops.up_projection import Activation, up_projection
from beit3_ds.layout import RowLayout
from beit3_ds.parallel import TensorParallel, split_parameter


class ColumnParallelMultiwayLinear(nn.Module):
    """Holds one linear layer per expert (paper section 2.1); output features are split over tensor-parallel ranks.

    A subclass or the parent module applies it, and a RowParallelMultiwayLinear follows. Pass the input through
    `TensorParallel.gather_from` once for all layers that share this input. The layer itself sends nothing. Its
    parameters are `weight_EXPERT` and `bias_EXPERT`. The module registers them itself, without child modules, so that
    one ZeRO-3 hook gathers all of them. `initialization.initialize_parameters` sets them; before, they are
    uninitialised.
    """

    def __init__(self, in_features: int, out_features: int, experts: tuple[str, ...], tensor: TensorParallel) -> None:
        super().__init__()
        self.experts = experts
        split = tensor.split(out_features)
        for expert in experts:
            self.register_parameter(f"weight_{expert}", split_parameter(split, out_features, in_features))
            self.register_parameter(f"bias_{expert}", split_parameter(split, out_features))

    def weights(self) -> tuple[Tensor, ...]:
        """Returns the matrices (F, D) of all experts."""
        return _weights(self)

    def biases(self) -> tuple[Tensor, ...]:
        """Returns the vectors (F,) of all experts."""
        return _biases(self)


class UpProjection(ColumnParallelMultiwayLinear):
    """Implements the first linear layer of the FFN; its GPU kernel also applies GELU."""

    def forward(
        self, x_TD: Tensor, layout: RowLayout, recompute: Recomputable | None = None, *, has_norm: bool
    ) -> Activation:
        """Returns this rank's output features of all rows, as the input of a RowParallelMultiwayLinear with `gelu`.

        Args:
            x_TD: all rows.
            layout: row range of each expert.
            recompute: recomputes x in the backward pass; None saves x instead.
            has_norm: whether a sub-LN follows.
        """
        return up_projection(
            x_TD,
            layout.expert_slices(self.experts),
            _weights(self),
            _biases(self),
            has_norm=has_norm,
            recompute=recompute,
        )


class RowParallelMultiwayLinear(nn.Module):
    """Ends a branch with one linear layer per expert, with input features split over the tensor-parallel group.

    Applies GELU and sub-LN to its input, if requested, and adds the output to the residual stream. Communicates like
    `TensorParallel.reduce_scatter_to`; with a sub-LN, forward and backward also send two floats per row. Every rank
    holds the whole bias, which is added once, after the reduction. Parameters have the same names as in
    ColumnParallelMultiwayLinear.
    """

    def __init__(self, in_features: int, out_features: int, experts: tuple[str, ...], tensor: TensorParallel) -> None:
        super().__init__()
        self.experts, self.tensor = experts, tensor
        split = tensor.split(in_features, dim=1)
        for expert in experts:
            self.register_parameter(f"weight_{expert}", split_parameter(split, out_features, in_features))
            self.register_parameter(f"bias_{expert}", nn.Parameter(torch.empty(out_features)))

    def forward(
        self,
        activation: Activation,
        residual_TD: Tensor,
        factor_T: Tensor | None,
        layout: RowLayout,
        *,
        gelu: bool = False,
        norm: SubNorm | None = None,
    ) -> Tensor:
        """Returns this rank's rows of the stream after the branch, (T, D).

        Args:
            activation: this rank's input features of all rows.
            residual_TD: this rank's rows of the stream.
            factor_T: stochastic-depth factor of each row of this rank; None without stochastic depth.
            layout: row range of each expert.
            gelu: whether to apply GELU to the input.
            norm: sub-LN to apply to the input; None applies no norm.
        """
        slices = layout.expert_slices(self.experts)
        if self.tensor.size == 1:
            stream = {"residual_TD": residual_TD, "factor_T": factor_T}
            return out_projection(activation, slices, _weights(self), _biases(self), gelu=gelu, norm=norm, **stream)
        partial_TD = self.tensor.reduce_scatter_to(
            out_projection(activation, slices, _weights(self), gelu=gelu, norm=norm)
        )
        own_slices = self.tensor.own_slices(slices, layout.num_rows)
        return residual_add(residual_TD, partial_TD, own_slices, self.tensor.share(*_biases(self)), factor_T)


class NormOutput(NamedTuple):
    """Holds the stream, its normalised rows, and the parameters from which these rows can be recomputed.

    Another module of the same block saves the parameters for backward.
    """

    stream_TD: Tensor
    """Input of the norm, for the residual connection; the norm's backward pass adds the gradient of this tensor."""
    h_TD: Tensor
    """Normalised rows."""
    scales: tuple[Tensor, ...]
    """Weight of each expert."""
    shifts: tuple[Tensor, ...]
    """Bias of each expert."""


class MultiwayLayerNorm(nn.Module):
    """Applies one LayerNorm per expert; its parameters `weight_EXPERT` and `bias_EXPERT` are uninitialised."""

    def __init__(self, hidden_size: int, epsilon: float, experts: tuple[str, ...], tensor: TensorParallel) -> None:
        """Builds the norms.

        Args:
            hidden_size: width of a row.
            epsilon: added to the variance.
            experts: names of the experts.
            tensor: the tensor-parallel group, which may split the rows.
        """
        super().__init__()
        self.epsilon, self.experts, self.tensor = epsilon, experts, tensor
        for expert in experts:
            self.register_parameter(f"weight_{expert}", nn.Parameter(torch.empty(hidden_size)))
            self.register_parameter(f"bias_{expert}", nn.Parameter(torch.empty(hidden_size)))

    def forward(self, x_TD: Tensor, slices: Sequence[tuple[int, int]]) -> NormOutput:
        """Normalises every row and scales it with the parameters of its expert.

        With sequence parallelism backward all-reduces the gradients of the parameters (`TensorParallel.share`).

        Args:
            x_TD: this rank's rows of the stream, or gathered rows.
            slices: the experts' row ranges in x, in the order of `experts`.
        """
        parameters = self.tensor.share(*_weights(self), *_biases(self))
        weights, biases = parameters[: len(slices)], parameters[len(slices) :]
        return NormOutput(*multiway_layer_norm(x_TD, slices, weights, biases, self.epsilon), weights, biases)

    def recompute(self, output: NormOutput, slices: Sequence[tuple[int, int]]) -> Recomputable | None:
        """Returns an object that recomputes the normalised rows for later layers; None with sequence parallelism.

        With sequence parallelism, recomputed rows would have to be gathered a second time.

        Args:
            output: result of `forward`.
            slices: the experts' row ranges, as in `forward`.
        """
        if self.tensor.divides_rows:
            return None
        return recomputable_rows(output.stream_TD, slices, output.scales, output.shifts, self.epsilon)


class MultiwaySubLayerNorm(nn.Module):
    """Holds the parameters of a sub-LN, whose width is split over the tensor-parallel group.

    RowParallelMultiwayLinear applies the norm. The parameters `weight_EXPERT` and `bias_EXPERT` are uninitialised.
    """

    def __init__(self, width: int, epsilon: float, experts: tuple[str, ...], tensor: TensorParallel) -> None:
        """Builds the parameters.

        Args:
            width: width of a row over all ranks.
            epsilon: added to the variance.
            experts: names of the experts.
            tensor: the tensor-parallel group.
        """
        super().__init__()
        self.width, self.epsilon, self.experts, self.tensor = width, epsilon, experts, tensor
        split = tensor.split(width)
        for expert in experts:
            self.register_parameter(f"weight_{expert}", split_parameter(split, width))
            self.register_parameter(f"bias_{expert}", split_parameter(split, width))

    def forward(self) -> SubNorm:
        """Returns the norm, which RowParallelMultiwayLinear applies."""
        is_divided = self.tensor.size > 1
        return SubNorm(
            _weights(self),
            _biases(self),
            self.epsilon,
            self.width,
            self.tensor.all_gather if is_divided else None,
            self.tensor.all_reduce if is_divided else None,
        )


def _weights(module: Any) -> tuple[Tensor, ...]:
    return tuple([getattr(module, name) for name in _weight_names(module.experts)])


def _biases(module: Any) -> tuple[Tensor, ...]:
    return tuple([getattr(module, name) for name in _bias_names(module.experts)])


@lru_cache
def _weight_names(experts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"weight_{expert}" for expert in experts)


@lru_cache
def _bias_names(experts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"bias_{expert}" for expert in experts)
