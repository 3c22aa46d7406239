"""The released models' code, to compare with: torchscale 0.3.0 (MIT), with unilm's two heads on top."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from beit3_ds.benchmarks.step.reference import build_torchscale


class Reference(nn.Module):
    """Builds a pretraining model under the names of the released files."""

    def __init__(self, arguments: Mapping[str, Any], visual_vocab_size: int) -> None:
        super().__init__()
        self.beit3 = build_torchscale(arguments)
        self.mlm_head = nn.Linear(arguments["encoder_embed_dim"], arguments["vocab_size"])
        self.mim_head = nn.Linear(arguments["encoder_embed_dim"], visual_vocab_size)

    @torch.no_grad()
    def randomize(self) -> "Reference":
        """Moves every parameter away from its neighbours, unused rows of tables included."""
        generator = torch.Generator().manual_seed(11)
        for name, parameter in self.named_parameters():
            parameter.normal_(0, 0.2, generator=generator)
            if "norm" in name or "_ln." in name:
                parameter += 1
        return self
