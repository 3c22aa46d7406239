"""Implements linear layers and norms per expert, applied to the expert's slice of the packed stream."""

# T packed rows, D input width, F output width.

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from beit3_ds.kernels.ops.multiway_layer_norm import multiway_layer_norm, recomputable_rows
from beit3_ds.kernels.ops.multiway_linear import multiway_linear
from beit3_ds.kernels.ops.out_projection import out_projection
from beit3_ds.kernels.ops.recompute import Recomputable
from beit3_ds.kernels.ops.residual_add import residual_add
from beit3_ds.kernels.ops.sub_norm import SubNorm
from beit3_ds.kernels.ops.up_projection import Activation, up_projection
from beit3_ds.layout import RowLayout
from beit3_ds.parallel import TensorParallel, split_parameter


class ColumnParallelMultiwayLinear(nn.Module):
    """Applies one linear layer per expert (paper section 2.1); output features are split over tensor-parallel ranks.

    Follow it with RowParallelMultiwayLinear. Pass the input through `TensorParallel.gather_from` once for all layers
    that share this input. The layer itself sends nothing. Parameters are `weight_EXPERT` and `bias_EXPERT`. They belong
    to this module, not to children, so that a ZeRO-3 hook gathers them for the one call that uses them all. They are
    uninitialised until `initialization.initialize_parameters`.
    """

    def __init__(self, in_features: int, out_features: int, experts: tuple[str, ...], tensor: TensorParallel) -> None:
        super().__init__()
        self.experts = experts
        split = tensor.split(out_features)
        for expert in experts:
            self.register_parameter(f"weight_{expert}", split_parameter(split, out_features, in_features))
            self.register_parameter(f"bias_{expert}", split_parameter(split, out_features))

    def forward(self, x_TD: Tensor, layout: RowLayout, recompute: Recomputable | None = None) -> Tensor:
        """Returns this rank's output features, (T, F / P); each expert computes its own rows, a single expert all rows.

        Args:
            x_TD: all rows.
            layout: slice of each expert.
            recompute: recomputes x in the backward pass; None saves x instead.
        """
        return multiway_linear(x_TD, layout.expert_slices(self.experts), _weights(self), _biases(self), recompute)


class UpProjection(ColumnParallelMultiwayLinear):
    """Implements the first layer of the FFN; on a GPU it also applies GELU."""

    cuda_cpp = False
    """Whether to use the kernel in CUDA C++ (`kernel_backend.select_kernels`)."""

    def forward(  # type: ignore[override]
        self, x_TD: Tensor, layout: RowLayout, recompute: Recomputable | None = None, *, with_statistics: bool
    ) -> Activation:
        """Returns this rank's features, (T, F / P), for a RowParallelMultiwayLinear with GELU.

        Args:
            x_TD: all rows.
            layout: slice of each expert.
            recompute: recomputes x in the backward pass; None saves x instead.
            with_statistics: whether a sub-LN follows.
        """
        return up_projection(
            x_TD,
            layout.expert_slices(self.experts),
            _weights(self),
            _biases(self),
            with_statistics=with_statistics,
            recompute=recompute,
            cuda_cpp=self.cuda_cpp,
        )


class RowParallelMultiwayLinear(nn.Module):
    """Ends a branch with one linear layer per expert, with input features split over the tensor-parallel group.

    Applies GELU and sub-LN to its input and adds the branch to the stream. Communicates as
    `TensorParallel.reduce_scatter_to` does, and sends two floats per row each way for a sub-LN. Every rank holds the
    whole bias; it is added once, after the reduction, with the residual. Parameters have the same names as in
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
            activation: this rank's input features of all rows, (T, F / P).
            residual_TD: this rank's rows of the stream.
            factor_T: factor of stochastic depth per row of this rank, or None.
            layout: slice of each expert.
            gelu: whether to apply GELU to the input.
            norm: sub-LN of the input, or None.
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
    """Holds the stream, its normalised rows, and copies of the parameters with which these rows are recomputed.

    They are copies because another module saves them: ZeRO-3 partitions a module's own parameters after its forward.
    """

    stream_TD: Tensor
    """Input of the norm, for the residual; the norm's backward pass adds its gradient."""
    h_TD: Tensor
    """Normalised rows."""
    scales: tuple[Tensor, ...]
    """Weight per expert, (D,), without a gradient."""
    shifts: tuple[Tensor, ...]
    """Bias per expert, (D,), without a gradient."""


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
            x_TD: rows of the stream, or rows gathered from it.
            slices: the experts' row ranges in x, in the order of `experts`.
        """
        parameters = self.tensor.share(*_weights(self), *_biases(self))
        weights, biases = parameters[: len(slices)], parameters[len(slices) :]
        scales, shifts = (tuple(p.detach().clone() for p in group) for group in (weights, biases))
        return NormOutput(*multiway_layer_norm(x_TD, slices, weights, biases, self.epsilon), scales, shifts)

    def recompute(self, output: NormOutput, slices: Sequence[tuple[int, int]]) -> Recomputable | None:
        """Returns an object with which later layers recompute the normalised rows; None with sequence parallelism.

        With sequence parallelism recomputed rows would be gathered twice.

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
        """Returns the norm, with copies of its parameters.

        They are copies because another module uses them: ZeRO-3 partitions a module's own parameters after its forward.
        """
        is_divided = self.tensor.size > 1
        return SubNorm(
            [parameter.clone() for parameter in _weights(self)],
            [parameter.clone() for parameter in _biases(self)],
            self.epsilon,
            self.width,
            self.tensor.all_gather if is_divided else None,
            self.tensor.all_reduce if is_divided else None,
        )


def _weights(module: Any) -> list[Tensor]:
    return [getattr(module, f"weight_{expert}") for expert in module.experts]


def _biases(module: Any) -> list[Tensor]:
    return [getattr(module, f"bias_{expert}") for expert in module.experts]
