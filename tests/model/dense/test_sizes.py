"""Checks the parameter counts of large dense models, built on the meta device."""

import pytest
import torch

from beit3_ds.config import MODEL_SIZES, DenseConfig, ModelConfig
from beit3_ds.model import BEiT3

GLOBAL_BLOCKS = {"base": (2, 5, 8, 11), "large": (5, 11, 17, 23), "giant": (9, 19, 29, 39)}


@pytest.mark.parametrize("size", GLOBAL_BLOCKS)
def test_parameters_at_1024_pixels(size: str) -> None:
    """Catches experts, tokens or tables that a dense task does not use; AdamW would still decay them."""
    sizes = MODEL_SIZES[size] | {"patch_size": 16}
    dense = DenseConfig(window_size=14, global_blocks=GLOBAL_BLOCKS[size], relative_positions=True)
    config = ModelConfig(**sizes, image_size=1024, inputs=("images",), dense=dense)
    with torch.device("meta"):
        model = BEiT3(config)
    hidden, ffn, head = config.hidden_size, config.ffn_hidden_size, config.head_size
    block = 4 * hidden * (hidden + 1) + 2 * hidden * ffn + ffn + hidden + 4 * hidden
    counts = {"embeddings": hidden * (3 * 16**2 + 1) + 64**2 * hidden, "norm": 2 * hidden}
    for layer in range(config.num_layers):
        extent = 64 if layer in dense.global_blocks else 14
        counts[f"blocks.{layer}"] = block + 2 * (2 * extent - 1) * head
    for name, count in counts.items():
        part = model.get_submodule(name)
        assert sum(p.numel() for p in part.parameters()) == count, name
    total = sum(p.numel() for p in model.parameters())
    assert total == sum(counts.values())
    assert round(total / 1e6) == {"base": 89, "large": 307, "giant": 1017}[size]
