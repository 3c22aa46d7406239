"""Computes the initial values of a ViT-Adapter's parameters."""

import torch
from torch import Tensor, nn

from beit3_ds.model.vit_adapter.config import AdapterConfig
from beit3_ds.model.vit_adapter.deformable_attention import ring_offsets


def adapter_initial_value(
    name: str, shape: torch.Size, config: AdapterConfig, generator: torch.Generator
) -> Tensor | None:
    """Returns the special initial value that the original code gives to a parameter, or None if it gives none.

    Injector factors start at `AdapterConfig.initial_scale`. Convolutions use Kaiming normal initialization (fan-out).
    Level embeddings are drawn from a standard normal distribution. In deformable attention, the value and output
    projections use Xavier uniform initialization. The sampling points start on rings around each query
    (`ring_offsets`), and all attention weights start equal.

    Args:
        name: name of the parameter within the adapter, such as `interactions.0.injector.gamma`.
        shape: shape of the parameter.
        config: sizes of the adapter.
        generator: generator of random numbers.

    Returns:
        Initial value, float32 on the CPU. None for norms, for linear layers outside deformable attention, for the
        biases of convolutions, and for the biases of the value and output projections.
    """
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "gamma":
        return torch.full(shape, config.initial_scale)
    if leaf == "level_embed":
        return torch.empty(shape).normal_(generator=generator)
    if name.endswith("sampling_offsets.bias"):
        num_levels = len(torch.empty(shape)) // (2 * config.num_heads * config.num_points)
        return ring_offsets(config.num_heads, num_levels, config.num_points)
    if ".sampling_offsets." in name or ".attention_weights." in name:
        return torch.zeros(shape)
    if name.endswith(("value_proj.weight", "output_proj.weight")):
        return nn.init.xavier_uniform_(torch.empty(shape), generator=generator)
    if len(shape) == 4:
        fan_out = shape[1] * shape[2] * shape[3] if ".up." in name else shape[0] * shape[2] * shape[3]
        fan_out //= shape[0] if ".dwconv." in name else 1
        return torch.empty(shape).normal_(std=(2 / fan_out) ** 0.5, generator=generator)
    return None
