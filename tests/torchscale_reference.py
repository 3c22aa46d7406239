"""Provides the released models' code as a reference: torchscale 0.3.0 (MIT) with unilm's two heads."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from beit3_ds.benchmarks.step.reference import build_torchscale


class Reference(nn.Module):
    """Builds a pretraining model with the parameter names of the released files."""

    def __init__(self, arguments: Mapping[str, Any], visual_vocab_size: int) -> None:
        super().__init__()
        self.beit3 = build_torchscale(arguments)
        self.mlm_head = nn.Linear(arguments["encoder_embed_dim"], arguments["vocab_size"])
        self.mim_head = nn.Linear(arguments["encoder_embed_dim"], visual_vocab_size)

    @torch.no_grad()
    def randomize(self) -> "Reference":
        """Draws every parameter at random, including unused rows of tables."""
        generator = torch.Generator().manual_seed(11)
        for name, parameter in self.named_parameters():
            parameter.normal_(0, 0.2, generator=generator)
            if "norm" in name or "_ln." in name:
                parameter += 1
        return self
