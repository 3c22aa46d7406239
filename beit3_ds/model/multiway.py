"""Implements linear layers and norms with one set of parameters per expert. Each row uses its expert's set."""

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
    """Holds one linear layer per expert, with output features split over tensor-parallel ranks (paper, section 2.1).

    A subclass or the parent module applies the layer, and a RowParallelMultiwayLinear follows. The layer does not
    communicate. The caller passes the input through `TensorParallel.gather_from` first, once for all layers that share
    the input.

    The parameters are `weight_EXPERT` and `bias_EXPERT`. They belong to this module instead of child modules, so that
    ZeRO-3 gathers all of them in one hook. They are uninitialized until `initialize_parameters` is called.
    """

    def __init__(self, in_features: int, out_features: int, experts: tuple[str, ...], tensor: TensorParallel) -> None:
        super().__init__()
        self.experts = experts
        split = tensor.split(out_features)
        for expert in experts:
            self.register_parameter(f"weight_{expert}", split_parameter(split, out_features, in_features))
            self.register_parameter(f"bias_{expert}", split_parameter(split, out_features))

    def weights(self) -> tuple[Tensor, ...]:
        """Returns the weight matrix (F, D) of each expert."""
        return _weights(self)

    def biases(self) -> tuple[Tensor, ...]:
        """Returns the bias (F,) of each expert."""
        return _biases(self)


class UpProjection(ColumnParallelMultiwayLinear):
    """Implements the first linear layer of the FFN. A GPU kernel may fuse GELU into it."""

    def forward(
        self, x_TD: Tensor, layout: RowLayout, recompute: Recomputable | None = None, *, has_norm: bool
    ) -> Activation:
        """Returns this rank's output features of all rows, as input for RowParallelMultiwayLinear with `gelu=True`.

        Args:
            x_TD: all rows.
            layout: row ranges of the experts.
            recompute: recomputes x in the backward pass; None saves x instead.
            has_norm: whether a sub-LayerNorm follows.
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
    """Applies one linear layer per expert, with input features split over tensor-parallel ranks, and adds the residual.

    Can apply GELU and a sub-LayerNorm to its input. Communicates like `TensorParallel.reduce_scatter_to`. With a
    sub-LayerNorm, the ranks also exchange two floats per row in the forward pass, and two in the backward pass. Each
    rank holds the whole bias, which is added once, after the reduction. With sequence parallelism, the backward pass
    all-reduces the gradients of the biases (`TensorParallel.share`). Parameters are named as in
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
        """Returns this rank's rows of the residual stream, to which the layer's output has been added, (T, D).

        Args:
            activation: this rank's input features of all rows.
            residual_TD: this rank's rows of the residual stream before the addition.
            factor_T: stochastic-depth factor of each row of `residual_TD`; None without stochastic depth.
            layout: row ranges of the experts.
            gelu: whether to apply GELU to the input.
            norm: sub-LayerNorm to apply to the input; None applies no norm.
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
    """Holds the output of a MultiwayLayerNorm."""

    stream_TD: Tensor
    """View of the norm's input, for the residual connection. The backward pass of the norm adds the gradient of this
    view to the gradient through the norm."""
    h_TD: Tensor
    """Normalized rows."""
    recompute: Recomputable | None
    """Recomputes the normalized rows for layers whose backward pass needs the rows. None with sequence parallelism,
    where the recomputed rows would have to be gathered again."""


class MultiwayLayerNorm(nn.Module):
    """Applies one LayerNorm per expert, with parameters `weight_EXPERT` and `bias_EXPERT`."""

    def __init__(self, hidden_size: int, epsilon: float, experts: tuple[str, ...], tensor: TensorParallel) -> None:
        """Builds the norms with uninitialized parameters.

        Args:
            hidden_size: number of features per row.
            epsilon: epsilon added to the variance.
            experts: names of the experts.
            tensor: the tensor-parallel group, which splits the rows under sequence parallelism.
        """
        super().__init__()
        self.epsilon, self.experts, self.tensor = epsilon, experts, tensor
        for expert in experts:
            self.register_parameter(f"weight_{expert}", nn.Parameter(torch.empty(hidden_size)))
            self.register_parameter(f"bias_{expert}", nn.Parameter(torch.empty(hidden_size)))

    def forward(self, x_TD: Tensor, slices: Sequence[tuple[int, int]]) -> NormOutput:
        """Normalizes each row with the parameters of the row's expert.

        With sequence parallelism, the backward pass all-reduces the gradients of the parameters
        (`TensorParallel.share`).

        Args:
            x_TD: this rank's rows of the residual stream, or all rows.
            slices: row range in `x_TD` of each expert, in the order of `experts`.
        """
        parameters = self.tensor.share(*_weights(self), *_biases(self))
        weights, biases = parameters[: len(slices)], parameters[len(slices) :]
        stream_TD, h_TD = multiway_layer_norm(x_TD, slices, weights, biases, self.epsilon)
        if self.tensor.divides_rows:
            return NormOutput(stream_TD, h_TD, None)
        return NormOutput(stream_TD, h_TD, recomputable_rows(stream_TD, slices, weights, biases, self.epsilon))


class MultiwaySubLayerNorm(nn.Module):
    """Holds the parameters of a sub-LayerNorm, split over tensor-parallel ranks; RowParallelMultiwayLinear applies it.

    The parameters are `weight_EXPERT` and `bias_EXPERT`.
    """

    def __init__(self, width: int, epsilon: float, experts: tuple[str, ...], tensor: TensorParallel) -> None:
        """Creates the parameters, uninitialized.

        Args:
            width: number of features per row, over all ranks.
            epsilon: epsilon added to the variance.
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
        """Returns the norm's parameters as a `SubNorm`, which RowParallelMultiwayLinear applies."""
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
    parameters = module._parameters  # a dict: faster than attributes of the module, which a layer reads 40 times
    return tuple([parameters[name] for name in _weight_names(module.experts)])


def _biases(module: Any) -> tuple[Tensor, ...]:
    parameters = module._parameters
    return tuple([parameters[name] for name in _bias_names(module.experts)])


@lru_cache
def _weight_names(experts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"weight_{expert}" for expert in experts)


@lru_cache
def _bias_names(experts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"bias_{expert}" for expert in experts)
