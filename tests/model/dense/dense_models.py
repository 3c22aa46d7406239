"""Builds small models with `model.dense`, and images for them."""

import torch
from torch import Tensor

from beit3_ds.config import ModelConfig
from beit3_ds.config.dense import DenseConfig
from beit3_ds.model import BEiT3, initialize_parameters
from beit3_ds.patch_grids import Grids
from tests.batches import small_model_config


def dense_config(
    window_size: int = 3, global_blocks: tuple[int, ...] = (1,), relative_positions: bool = True, **changes: object
) -> ModelConfig:
    """Returns a model of three blocks with patches of 4 pixels and positions for 4 x 4 patches."""
    dense = DenseConfig(window_size=window_size, global_blocks=global_blocks, relative_positions=relative_positions)
    return small_model_config(inputs=("images",), dense=dense, **changes)


def build_dense(config: ModelConfig) -> BEiT3:
    """Returns a model with random parameters, including those that a new model sets to zero or one."""
    model = BEiT3(config)
    initialize_parameters(model, config, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def random_images(grids: Grids, patch_size: int = 4, seed: int = 0) -> list[Tensor]:
    """Returns random pixels of images with the given numbers of patch rows and columns."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, height * patch_size, width * patch_size, generator=generator) for height, width in grids]
