"""Linear layers and norms of which every expert has its own, applied to the expert's slice of the packed stream."""

# T packed rows, D input width, F output width.

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_ds.batch import PackedBatch, Route
from beit3_ds.kernels.multiway_linear import multiway_linear


class MultiwayLinear(nn.Module):
    """One linear layer an expert (paper section 2.1); parameters are `weight_EXPERT` and `bias_EXPERT`.

    The parameters belong to this module, not to children, so that a ZeRO-3 hook gathers them for the one call that uses
    them all. They are left uninitialised: see `initialization.initialize_parameters`.
    """

    def __init__(self, in_features: int, out_features: int, experts: tuple[str, ...]) -> None:
        super().__init__()
        self.experts = experts
        for expert in experts:
            self.register_parameter(f"weight_{expert}", nn.Parameter(torch.empty(out_features, in_features)))
            self.register_parameter(f"bias_{expert}", nn.Parameter(torch.empty(out_features)))

    def forward(self, x_TD: Tensor, batch: PackedBatch) -> Tensor:
        """Returns y_TF, each row from its own expert; a single expert takes all rows."""
        routes = batch.routes(self.experts)
        weights = [getattr(self, f"weight_{expert}") for expert in self.experts]
        biases = [getattr(self, f"bias_{expert}") for expert in self.experts]
        return multiway_linear(x_TD, [(route.start, route.stop) for route in routes], weights, biases)


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
