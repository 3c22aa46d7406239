"""Builds small random models that generate captions."""

import torch

from beit3_ds.config import ModelConfig
from beit3_ds.model import TaskModel
from beit3_ds.tasks.captioning.head import CaptionHead


@torch.no_grad()
def random_captioner(config: ModelConfig, seed: int = 0) -> TaskModel:
    """Returns a model whose captions differ between images and have different lengths."""
    model, generator = TaskModel(CaptionHead, config), torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.normal_(0, 0.3, generator=generator)
        if "norm.weight" in name:
            parameter += 1
    model.heads.mlm.bias[2] = 1.5  # EOS, so that some captions end before the limit
    return model.eval()
