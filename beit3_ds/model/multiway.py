"""Linear layers and norms of which every expert has its own, applied to the expert's slice of the packed stream."""

# T packed rows, D input width, F output width.

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from beit3_ds.kernels.ops.multiway_layer_norm import multiway_layer_norm, row_source
from beit3_ds.kernels.ops.multiway_linear import multiway_linear
from beit3_ds.kernels.ops.out_projection import out_projection
from beit3_ds.kernels.ops.recompute import RowSource
from beit3_ds.kernels.ops.residual_add import residual_add
from beit3_ds.kernels.ops.sub_norm import SubNorm
from beit3_ds.kernels.ops.up_projection import Activation, up_projection
from beit3_ds.layout import RowLayout
from beit3_ds.parallel import TensorParallel, split_parameter


class ColumnParallelMultiwayLinear(nn.Module):
    """One linear layer an expert (paper section 2.1), its output features split over the tensor-parallel ranks.

    Follow it with RowParallelMultiwayLinear, and pass its input through `TensorParallel.gather_from` once for all
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

    def forward(self, x_TD: Tensor, layout: RowLayout, source: RowSource | None = None) -> Tensor:
        """Returns this rank's features (T, F / P), each row from its own expert; a single expert takes all rows.

        Args:
            x_TD: all rows.
            layout: tells the experts' slices.
            source: of x, if it is to be made again in the backward pass instead of kept.
        """
        return multiway_linear(x_TD, layout.expert_slices(self.experts), _weights(self), _biases(self), source)


class UpProjection(ColumnParallelMultiwayLinear):
    """The FFN's first layer, which may activate its output while it is at hand."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        experts: tuple[str, ...],
        tensor: TensorParallel,
        cuda_cpp: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, experts, tensor)
        self.cuda_cpp = cuda_cpp

    def forward(  # type: ignore[override]
        self, x_TD: Tensor, layout: RowLayout, source: RowSource | None = None, *, with_statistics: bool
    ) -> Activation:
        """Returns this rank's features (T, F / P) for a RowParallelMultiwayLinear with a GELU.

        Args:
            x_TD: all rows.
            layout: tells the experts' slices.
            source: of x, if it is to be made again in the backward pass instead of kept.
            with_statistics: whether a sub-LN follows.
        """
        return up_projection(
            x_TD,
            layout.expert_slices(self.experts),
            _weights(self),
            _biases(self),
            with_statistics=with_statistics,
            source=source,
            cuda_cpp=self.cuda_cpp,
        )


class RowParallelMultiwayLinear(nn.Module):
    """One linear layer an expert that ends a branch, its input features split over the tensor-parallel ranks.

    Applies GELU and sub-LN to its input and adds the branch to the stream. Sends what
    `TensorParallel.reduce_scatter_to` sends, and two floats per row each way for a sub-LN. Every rank holds the bias;
    it is added once, after the reduction, with the residual. Parameters as in ColumnParallelMultiwayLinear.
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
            factor_T: what stochastic depth multiplies these rows of the branch with, or None.
            layout: tells the experts' slices.
            gelu: whether the input is to be activated first.
            norm: the sub-LN, or None.
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


class MultiwayLayerNorm(nn.Module):
    """One LayerNorm an expert; parameters are `weight_EXPERT` and `bias_EXPERT`, left uninitialised."""

    def __init__(self, hidden_size: int, epsilon: float, experts: tuple[str, ...], tensor: TensorParallel) -> None:
        """Builds the norms.

        Args:
            hidden_size: width of a row.
            epsilon: added to the variance.
            experts: names of the experts.
            tensor: the ranks, which may divide the rows.
        """
        super().__init__()
        self.epsilon, self.experts, self.tensor = epsilon, experts, tensor
        for expert in experts:
            self.register_parameter(f"weight_{expert}", nn.Parameter(torch.empty(hidden_size)))
            self.register_parameter(f"bias_{expert}", nn.Parameter(torch.empty(hidden_size)))

    def forward(self, x_TD: Tensor, slices: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
        """Normalises every row and scales it with the parameters of its expert.

        Communicates the parameters' gradients where ranks divide the rows (`TensorParallel.share`).

        Args:
            x_TD: rows of the stream, or rows gathered from it.
            slices: the experts' row ranges in x, in the order of `experts`.

        Returns:
            x itself, for the residual: its gradient is then added where the norm's is made; the normalised rows; and
            copies of all scales and shifts for `source`, without gradients. Copies, for another module keeps them:
            ZeRO-3 divides a module's own parameters again after its call.
        """
        parameters = self.tensor.share(*_weights(self), *_biases(self))
        weights, biases = parameters[: len(slices)], parameters[len(slices) :]
        copies = (parameter.detach().clone() for parameter in parameters)
        return (*multiway_layer_norm(x_TD, slices, weights, biases, self.epsilon), *copies)

    def source(self, x_TD: Tensor, slices: Sequence[tuple[int, int]], copies: Sequence[Tensor]) -> RowSource | None:
        """What layers keep instead of the normalised rows; None where ranks divide them: they would be gathered twice.

        Args:
            x_TD: what `forward` took.
            slices: likewise.
            copies: what it returned of the parameters.
        """
        if self.tensor.divides_rows:
            return None
        return row_source(x_TD, slices, copies[: len(slices)], copies[len(slices) :], self.epsilon)


class MultiwaySubLayerNorm(nn.Module):
    """The parameters of a sub-LN, whose width the tensor-parallel ranks divide; RowParallelMultiwayLinear applies it.

    Parameters are `weight_EXPERT` and `bias_EXPERT`, left uninitialised.
    """

    def __init__(self, width: int, epsilon: float, experts: tuple[str, ...], tensor: TensorParallel) -> None:
        """Builds the parameters.

        Args:
            width: of a row, over all ranks.
            epsilon: added to the variance.
            experts: names of the experts.
            tensor: the ranks.
        """
        super().__init__()
        self.width, self.epsilon, self.experts, self.tensor = width, epsilon, experts, tensor
        split = tensor.split(width)
        for expert in experts:
            self.register_parameter(f"weight_{expert}", split_parameter(split, width))
            self.register_parameter(f"bias_{expert}", split_parameter(split, width))

    def forward(self) -> tuple[Tensor, ...]:
        """Returns copies of all scales, then of all shifts.

        Copies, for another module works with them: ZeRO-3 divides a module's own parameters again after its call.
        """
        return tuple(parameter.clone() for parameter in (*_weights(self), *_biases(self)))

    def build(self, parameters: Sequence[Tensor]) -> SubNorm:
        """The norm with what `forward` returned."""
        experts, divided = len(self.experts), self.tensor.size > 1
        return SubNorm(
            parameters[:experts],
            parameters[experts:],
            self.epsilon,
            self.width,
            self.tensor.all_gather if divided else None,
            self.tensor.all_reduce if divided else None,
        )


def _weights(module: Any) -> list[Tensor]:
    return [getattr(module, f"weight_{expert}") for expert in module.experts]


def _biases(module: Any) -> list[Tensor]:
    return [getattr(module, f"bias_{expert}") for expert in module.experts]
