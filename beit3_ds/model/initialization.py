"""Computes initial values from the seed and the parameter's name, regardless of how ranks divide the model."""

import hashlib
import math
import re

import torch
from torch import Tensor, nn

from beit3_ds.config import ModelConfig
from beit3_ds.parallel import logical_part, logical_shape, own_part

STANDARD_DEVIATION = 0.02
"""Standard deviation, before truncation, of BEiT's initial weights outside the embeddings. The normal distribution is
truncated at +-0.02."""

_BLOCK = re.compile(r"^blocks\.(\d+)\.")
_OUTPUT_MATRIX = re.compile(r"\.(out_proj|fc2)\.weight")
_MAGNETO_GAINED = re.compile(r"\.(v_proj|out_proj|fc1|fc2)\.weight")


def initialize_parameters(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fills each parameter with this rank's part of the initial value. Padding rows are left unchanged."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = initial_value(name, logical_shape(parameter), config, seed)
            logical_part(parameter).copy_(own_part(parameter, value))


def initial_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """Returns the whole initial value of one parameter, float32 on the CPU.

    BEiT's initialization (paper, section 2.3) draws weights from a truncated normal distribution. The standard
    deviation is 0.02, or `config.initial_embedding_std` for embeddings. In block l (from 1), the weights of the
    attention output projection and the second FFN layer are divided by sqrt(2 l).

    With `sub_layernorm`, the weight matrices of blocks follow Magneto (arXiv:2210.06423, figure 2) instead, without
    this division. Their distribution is Xavier normal. The gain is sqrt(log(2 L)) for the value projection, the
    attention output projection and the FFN, and 1 for other matrices. L is the number of blocks.

    Biases and relative positions are 0, and norm weights are 1.

    Args:
        name: logical name, such as `blocks.3.ffn.fc2.weight_vision`.
        shape: logical shape.
        config: architecture of the model.
        seed: seed of the run.
    """
    leaf = name.rsplit(".", 1)[-1]
    if leaf.startswith("bias") or ".relative_position." in name:
        return torch.zeros(shape)
    if re.search(r"norm\.weight", name):
        return torch.ones(shape)
    generator = parameter_generator(seed, name)
    value, block = torch.empty(shape), _BLOCK.match(name)
    if config.sub_layernorm and block:
        gain = math.sqrt(math.log(2 * config.num_layers)) if _MAGNETO_GAINED.search(name) else 1.0
        return nn.init.xavier_normal_(value, gain, generator=generator)
    std = config.initial_embedding_std if name.startswith("embeddings.") else STANDARD_DEVIATION
    nn.init.trunc_normal_(value, std=std, a=-std, b=std, generator=generator)
    if block and _OUTPUT_MATRIX.search(name):
        value /= math.sqrt(2 * (int(block[1]) + 1))
    return value


def parameter_generator(seed: int, name: str) -> torch.Generator:
    """Returns the random generator for the initial value of the parameter `name` in a run with this seed."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
